// The routing operator on the CPU: one product for all dot products, then rows in parallel. Sums over
// tokens are kept per chunk of rows and added in order, so they do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../cosine_route_inputs.h"
#include "../number_of.h"
#include "cosine_route.h"
#include "product.h"

namespace sra::cpu {
namespace {

namespace stable = torch::stable;

constexpr int64_t kChunk = 512, kMostChunks = 64;
constexpr int64_t kMostParts = 16 << 20;  // numbers in the chunks' shares of the anchors' gradient

// Rows in chunks whose number and size depend on nothing but the number of rows.
struct Chunks {
  int64_t rows, each_rows, count;
  explicit Chunks(int64_t rows)
      : rows(rows),
        each_rows((rows + kMostChunks * kChunk - 1) / (kMostChunks * kChunk) * kChunk),
        count(rows == 0 ? 0 : (rows + each_rows - 1) / each_rows) {}

  // body(chunk, first row, last row), chunks in parallel.
  template <class Body>
  void each(const Body& body) const {
    stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) body(c, c * each_rows, std::min(rows, (c + 1) * each_rows));
    });
  }

  // sums[e] = sum over chunks of parts[chunk][e], in order.
  std::vector<float> sum(const std::vector<float>& parts, int64_t width) const {
    std::vector<float> sums(width, 0.0f);
    for (int64_t c = 0; c < count; ++c)
      for (int64_t e = 0; e < width; ++e) sums[e] += parts[c * width + e];
    return sums;
  }
};

std::vector<float> scales(const Tensor& temperature, int64_t experts) {
  std::vector<float> scale(experts);
  const float* tau = data<float>(temperature);
  for (int64_t e = 0; e < experts; ++e) scale[e] = std::abs(tau[temperature.size(0) == 1 ? 0 : e]);
  return scale;
}

int64_t count_valid(const bool* valid, int64_t tokens) {
  return valid == nullptr ? tokens : std::count(valid, valid + tokens, true);
}

Scores scores_of(const Tensor& dots, const Tensor& inverse_x, const Tensor& inverse_a,
                 const std::vector<float>& scale, int64_t top_k, int64_t gate) {
  return {data<float>(dots), data<float>(inverse_x),       data<float>(inverse_a),  scale.data(),
          1.0f / kNormEps,   static_cast<int>(dots.size(1)), static_cast<int>(top_k), static_cast<Gate>(gate)};
}

// Ids are addresses to the backward pass; on a GPU they are believed.
void check_ids(const Tensor& ids, int64_t experts) {
  const int64_t* first = data<int64_t>(ids);
  const bool known = std::all_of(first, first + ids.numel(), [=](int64_t id) { return id >= 0 && id < experts; });
  STD_TORCH_CHECK(known, "cosine_route: ids from 0 to ", experts - 1, " expected");
}

// The sum of float32 matrices of one shape, in their order, in place of the first.
Tensor sum_of(const std::vector<Tensor>& matrices) {
  stable::parallel_for(0, matrices[0].numel(), 4096, [&](int64_t first, int64_t last) {
    float* sum = data<float>(matrices[0]);
    for (size_t i = 1; i < matrices.size(); ++i) {
      const float* part = data<float>(matrices[i]);
      for (int64_t j = first; j < last; ++j) sum[j] += part[j];
    }
  });
  return matrices[0];
}

// Each chunk of tokens is widened to float32, multiplied, and routed while it is in the cache.
Routed cosine_route(const Tensor& x, const Tensor& anchors, const Tensor& temperature, int64_t top_k,
                    int64_t gate, bool fused, const OptionalTensor& valid, const OptionalTensor& selection_bias,
                    const OptionalTensor& noise) {
  check_route(x, anchors, temperature, top_k, gate, valid, selection_bias, noise);
  STD_TORCH_CHECK(!fused, "cosine_route: the fused kernels are for GPUs");
  const int64_t T = x.size(0), D = x.size(1), E = anchors.size(0);
  const Number number = number_of(x);
  const Tensor x_plain = detached(x), anchors_wide = detached(to_float(anchors));
  const Tensor anchors_DE = transposed(anchors_wide);
  Tensor dots = empty(anchors_wide, {T, E}), ids = empty(dots, {T, top_k}, ScalarType::Long);
  Tensor gates = empty(dots, {T, top_k}), load = empty(dots, {E}), mean_probs = empty(dots, {E});
  Tensor valid_count = empty(dots, {1});
  Tensor lse = empty(dots, {T}), inverse_x = empty(dots, {T}), inverse_a = empty(dots, {E});
  inverse_norms(anchors_wide.data_ptr(), Number::kFloat, E, D, kNormEps, data<float>(inverse_a), nullptr);

  const std::vector<float> scale = scales(temperature, E);
  const Scores scores = scores_of(dots, inverse_x, inverse_a, scale, top_k, gate);
  const Selection selection{data_or_null<float>(selection_bias), data_or_null<float>(noise),
                            data_or_null<bool>(valid)};
  const Chunks chunks(T);
  std::vector<float> loads(chunks.count * E, 0.0f), probs(chunks.count * E, 0.0f);
  chunks.each([&](int64_t c, int64_t first, int64_t last) {
    const bool narrow = number != Number::kFloat;
    const Tensor wide = narrow ? empty(dots, {last - first, D}) : rows(x_plain, first, last);
    inverse_norms(row_of(x, first), number, last - first, D, kNormEps, data<float>(inverse_x) + first,
                  narrow ? data<float>(wide) : nullptr);
    const Tensor part = product(wide, anchors_DE);
    std::memcpy(data<float>(dots) + first * E, part.data_ptr(), (last - first) * E * sizeof(float));
    route_rows(scores, selection, first, last, data<float>(gates), data<int64_t>(ids), data<float>(lse),
               &loads[c * E], &probs[c * E]);
  });
  const int64_t count = count_valid(selection.valid_T, T);
  const float tokens = static_cast<float>(std::max<int64_t>(1, count));
  data<float>(valid_count)[0] = static_cast<float>(count);
  const std::vector<float> routes = chunks.sum(loads, E), mass = chunks.sum(probs, E);
  for (int64_t e = 0; e < E; ++e) {
    data<float>(load)[e] = routes[e];
    data<float>(mean_probs)[e] = mass[e] / tokens;
  }
  return {gates, ids, load, mean_probs, lse, valid_count, dots, inverse_x, inverse_a};
}

// With bf16 tokens and anchors the gradient of the dot products is rounded to bf16 for both products, as
// a bf16 linear layer's would be; otherwise they are float32.
RouteGradients cosine_route_backward(const Tensor& grad_gates, const Tensor& grad_mean_probs,
                                     const Tensor& grad_lse, const Tensor& x, const Tensor& anchors,
                                     const Tensor& temperature, int64_t gate, bool, const OptionalTensor& valid,
                                     const Tensor& ids, const Tensor& lse, const Tensor& valid_count,
                                     const Tensor& dots, const Tensor& inverse_x, const Tensor& inverse_a) {
  check_route_backward(x, anchors, temperature, gate, valid,
                       {grad_gates, grad_mean_probs, grad_lse, ids, lse, valid_count, dots, inverse_x, inverse_a,
                        false});
  const int64_t T = x.size(0), D = x.size(1), E = anchors.size(0);
  check_ids(ids, E);
  const Number number = number_of(x);
  const bool short_products = number == Number::kBFloat16 && number_of(anchors) == number;
  const Number result = short_products ? number : Number::kFloat;
  const ScalarType type = short_products ? ScalarType::BFloat16 : ScalarType::Float;
  const Tensor factor_ED = detached(short_products ? anchors : to_float(anchors));
  const Tensor factor_TD = detached(short_products ? x : to_float(x));

  const std::vector<float> scale = scales(temperature, E);
  const Scores scores = scores_of(dots, inverse_x, inverse_a, scale, ids.size(1), gate);
  const bool* valid_T = data_or_null<bool>(valid);
  const float tokens = std::max(1.0f, *data<float>(valid_count));
  std::vector<float> per_token(E), along_x(T);
  for (int64_t e = 0; e < E; ++e) per_token[e] = data<float>(grad_mean_probs)[e] / tokens;
  const Upstream upstream{data<float>(grad_gates), per_token.data(), data<float>(grad_lse)};

  Tensor grad_dots = empty(dots, {T, E}, type), grad_x = stable::empty_like(x);
  const Chunks chunks(T);
  const bool in_parts = result == Number::kFloat && chunks.count > 1 && chunks.count * E * D <= kMostParts;
  std::vector<Tensor> anchor_parts(in_parts ? chunks.count : 0);
  std::vector<float> parts(chunks.count * E, 0.0f);
  chunks.each([&](int64_t c, int64_t first, int64_t last) {
    route_rows_backward(scores, upstream, valid_T, data<int64_t>(ids), data<float>(lse), first, last,
                        grad_dots.data_ptr(), result, along_x.data(), &parts[c * E]);
    const Tensor through_dots = product(rows(grad_dots, first, last), factor_ED);
    subtract_along(through_dots.data_ptr(), result, row_of(x, first), number, &along_x[first], last - first,
                   D, row_of(grad_x, first));
    if (in_parts) anchor_parts[c] = product(transposed(rows(grad_dots, first, last)), rows(factor_TD, first, last));
  });
  const std::vector<float> cosines = chunks.sum(parts, E);

  const Tensor through_dots = in_parts ? sum_of(anchor_parts) : product(transposed(grad_dots), factor_TD);
  Tensor grad_anchors = stable::empty_like(anchors);
  Tensor grad_temperature = zeros(temperature, {temperature.size(0)});
  std::vector<float> along_a(E);
  for (int64_t e = 0; e < E; ++e) {
    const int64_t entry = temperature.size(0) == 1 ? 0 : e;
    const float inverse = data<float>(inverse_a)[e], tau = data<float>(temperature)[entry];
    along_a[e] = inverse < scores.largest_inverse ? cosines[e] * scale[e] * inverse * inverse : 0.0f;
    data<float>(grad_temperature)[entry] += cosines[e] * static_cast<float>((tau > 0) - (tau < 0));
  }
  subtract_along(through_dots.data_ptr(), result, anchors.data_ptr(), number_of(anchors), along_a.data(), E, D,
                 grad_anchors.data_ptr());
  return {grad_x, grad_anchors, grad_temperature};
}

}  // namespace
}  // namespace sra::cpu

STABLE_TORCH_LIBRARY_IMPL(sra_kernels, CPU, m) {
  m.impl("cosine_route", TORCH_BOX(&sra::cpu::cosine_route));
  m.impl("cosine_route_backward", TORCH_BOX(&sra::cpu::cosine_route_backward));
}
