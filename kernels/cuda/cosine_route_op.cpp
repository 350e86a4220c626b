// The routing operator on a GPU. Fused: x is read once and dot products never leave the chip; otherwise they
// come from one product and are kept for the backward pass. Sums over tokens are those of blocks, added in
// their order.
#include "cosine_route.h"

#include <cstdint>

#include "../cosine_route_inputs.h"
#include "../number_of.h"
#include "device.h"

namespace sra::cuda {
namespace {

namespace stable = torch::stable;

constexpr float kLargestInverse = 1.0f / kNormEps;

void check(int error) { STD_TORCH_CHECK(error == 0, "sra_kernels: ", error_text(error)); }

Sizes sizes_of(const Tensor& x, const Tensor& anchors, int64_t top_k, int64_t gate) {
  return {x.size(0), static_cast<int>(anchors.size(0)), static_cast<int>(top_k), static_cast<Gate>(gate)};
}

Scaling scaling_of(const Tensor& inverse_x, const Tensor& inverse_a, const Tensor& temperature) {
  return {data<float>(inverse_x), data<float>(inverse_a), data<float>(temperature),
          temperature.size(0) == 1 ? 0 : 1, kLargestInverse};
}

void check_fused(const Tensor& x, const Tensor& anchors) {
  const bool bfloat16 = number_of(x) == Number::kBFloat16 && number_of(anchors) == Number::kBFloat16;
  STD_TORCH_CHECK(bfloat16 && x.size(1) % 8 == 0 && anchors.size(0) <= kFusedExperts,
                  "cosine_route: fused kernels take bfloat16, D a multiple of 8 and at most ", kFusedExperts,
                  " experts");
}

// The same numbers at an address that can be read 16 bytes at a time.
Tensor aligned(const Tensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0) return tensor;
  return stable::clone(tensor);
}

bool one_short_type(const Tensor& x, const Tensor& anchors) {
  return number_of(x) == number_of(anchors) && number_of(x) != Number::kFloat;
}

Routed cosine_route(const Tensor& x_any, const Tensor& anchors_any, const Tensor& temperature, int64_t top_k,
                    int64_t gate, bool fused, const OptionalTensor& valid, const OptionalTensor& selection_bias,
                    const OptionalTensor& noise) {
  check_route(x_any, anchors_any, temperature, top_k, gate, valid, selection_bias, noise);
  if (fused) check_fused(x_any, anchors_any);
  const OnDevice device(x_any);
  void* stream = device.stream();
  const Tensor x = aligned(detached(x_any)), anchors = aligned(detached(anchors_any));
  const int64_t T = x.size(0), D = x.size(1), E = anchors.size(0);
  const auto floats = [&](std::vector<int64_t> sizes) { return empty(x, sizes); };
  Tensor gates = floats({T, top_k}), ids = empty(x, {T, top_k}, ScalarType::Long);
  Tensor load = floats({E}), mean_probs = floats({E}), lse = floats({T}), valid_count = floats({1});
  Tensor inverse_x = floats({T}), inverse_a = floats({E});
  check(inverse_norms(anchors.data_ptr(), number_of(anchors), E, D, kNormEps, data<float>(inverse_a), stream));

  Forward in{sizes_of(x, anchors, top_k, gate), scaling_of(inverse_x, inverse_a, temperature),
             data_or_null<float>(selection_bias), data_or_null<float>(noise), data_or_null<bool>(valid),
             data<float>(gates), data<int64_t>(ids), data<float>(lse), nullptr};
  const int blocks = fused ? fused_blocks(in.sizes) : row_blocks(in.sizes);
  const Tensor parts = floats({blocks, 2 * E + 1});
  in.parts = data<float>(parts);
  Tensor dots = floats({0, E});
  if (fused) {
    check(route_fused(x.data_ptr(), anchors.data_ptr(), static_cast<int>(D), in, stream));
  } else {
    const bool wide = !one_short_type(x, anchors);
    dots = wide_product(wide ? to_float(x) : x, transposed(wide ? to_float(anchors) : anchors));
    check(inverse_norms(x.data_ptr(), number_of(x), T, D, kNormEps, data<float>(inverse_x), stream));
    check(route_rows(data<float>(dots), in, blocks, stream));
  }
  check(sum_statistics(in.parts, blocks, static_cast<int>(E), data<float>(load), data<float>(mean_probs),
                       data<float>(valid_count), stream));
  return {gates, ids, load, mean_probs, lse, valid_count, dots, inverse_x, inverse_a};
}

// With bfloat16 tokens and anchors the gradient of the dot products is rounded to bfloat16 for both products,
// as on the CPU; otherwise they are float32.
RouteGradients cosine_route_backward(const Tensor& grad_gates, const Tensor& grad_mean_probs,
                                     const Tensor& grad_lse, const Tensor& x_any, const Tensor& anchors_any,
                                     const Tensor& temperature, int64_t gate, bool fused,
                                     const OptionalTensor& valid, const Tensor& ids, const Tensor& lse,
                                     const Tensor& valid_count, const Tensor& dots, const Tensor& inverse_x,
                                     const Tensor& inverse_a) {
  check_route_backward(x_any, anchors_any, temperature, gate, valid,
                       {grad_gates, grad_mean_probs, grad_lse, ids, lse, valid_count, dots, inverse_x, inverse_a,
                        fused});
  if (fused) check_fused(x_any, anchors_any);
  const OnDevice device(x_any);
  void* stream = device.stream();
  const Tensor x = aligned(detached(x_any)), anchors = aligned(detached(anchors_any));
  const int64_t T = x.size(0), D = x.size(1), E = anchors.size(0);
  const int width = static_cast<int>(D), experts = static_cast<int>(E);
  const bool short_products = one_short_type(x, anchors) && number_of(x) == Number::kBFloat16;
  const Number number = short_products ? Number::kBFloat16 : Number::kFloat;
  Backward in{sizes_of(x, anchors, ids.size(1), gate), scaling_of(inverse_x, inverse_a, temperature),
              data<float>(grad_gates), data<float>(grad_mean_probs), data<float>(grad_lse),
              data_or_null<bool>(valid), data<float>(valid_count), data<int64_t>(ids), data<float>(lse), nullptr};
  const int blocks = fused ? fused_blocks(in.sizes) : row_blocks(in.sizes);
  const Tensor parts = empty(x, {blocks, E});
  in.parts = data<float>(parts);

  Tensor grad_x = stable::empty_like(x), grad_anchors = stable::empty_like(anchors);
  Tensor grad_temperature = empty(temperature, {temperature.size(0)}), cosines = empty(x, {E});
  const Tensor grad_dots = empty(x, {T, E}, short_products ? ScalarType::BFloat16 : ScalarType::Float);
  if (fused) {
    check(route_fused_backward(x.data_ptr(), anchors.data_ptr(), width, in, grad_dots.data_ptr(),
                               grad_x.data_ptr(), stream));
  } else {
    const Tensor along_x = empty(x, {T});
    check(route_rows_backward(data<float>(dots), in, blocks, grad_dots.data_ptr(), number, data<float>(along_x),
                              stream));
    const Tensor through_dots = wide_product(grad_dots, short_products ? anchors : to_float(anchors));
    check(subtract_along(data<float>(through_dots), x.data_ptr(), number_of(x), data<float>(along_x), T, D,
                         grad_x.data_ptr(), stream));
  }
  const Tensor through_dots = wide_product(transposed(grad_dots), short_products ? x : to_float(x));
  check(finish_anchors(data<float>(through_dots), anchors.data_ptr(), number_of(anchors), width, in.parts, blocks,
                       experts, in.scaling, static_cast<int>(temperature.size(0)), data<float>(cosines),
                       grad_anchors.data_ptr(), data<float>(grad_temperature), stream));
  return {grad_x, grad_anchors, grad_temperature};
}

}  // namespace
}  // namespace sra::cuda

STABLE_TORCH_LIBRARY_IMPL(sra_kernels, SRA_DEVICE, m) {
  m.impl("cosine_route", TORCH_BOX(&sra::cuda::cosine_route));
  m.impl("cosine_route_backward", TORCH_BOX(&sra::cuda::cosine_route_backward));
}
