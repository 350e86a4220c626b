// What the routing operator takes, on every device.
#pragma once

#include <algorithm>
#include <tuple>

#include "row_core.h"
#include "stable.h"

namespace sra {

constexpr float kNormEps = 1e-8f;  // as in ops/cosine_route.py

// gates, ids, load, mean_probs, lse, valid_count, dots, inverse_x, inverse_a
using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// of x, anchors and temperature
using RouteGradients = std::tuple<Tensor, Tensor, Tensor>;

inline void check_vectors(const Tensor& x, const Tensor& anchors, const Tensor& temperature, int64_t gate) {
  STD_TORCH_CHECK(x.dim() == 2 && anchors.dim() == 2 && x.size(1) == anchors.size(1),
                  "cosine_route: x T x D and anchors E x D expected, got ", shape(x), " and ", shape(anchors));
  const int64_t experts = anchors.size(0);
  STD_TORCH_CHECK(experts >= 1 && experts <= kMaxExperts, "cosine_route: 1 to ", kMaxExperts,
                  " experts expected, got ", experts);
  STD_TORCH_CHECK(x.is_contiguous() && readable(anchors, anchors.scalar_type(), {experts, x.size(1)}, x),
                  "cosine_route: contiguous x and anchors on one device expected");
  STD_TORCH_CHECK(temperature.dim() == 1 && (temperature.size(0) == 1 || temperature.size(0) == experts),
                  "cosine_route: temperature of 1 or E entries expected, got ", shape(temperature), " for ",
                  experts, " experts");
  STD_TORCH_CHECK(readable(temperature, ScalarType::Float, {temperature.size(0)}, x),
                  "cosine_route: temperature must be float32, contiguous and where x is");
  STD_TORCH_CHECK(gate >= kSelected && gate <= kStraightThrough, "cosine_route: no gate has the number ", gate);
}

inline void check_valid(const Tensor& x, const OptionalTensor& valid) {
  STD_TORCH_CHECK(readable(valid, ScalarType::Bool, {x.size(0)}, x),
                  "cosine_route: valid must be bool, one for each of ", x.size(0), " tokens, where x is");
}

inline void check_top_k(int64_t top_k, int64_t experts) {
  const int64_t most = std::min<int64_t>(kMaxTopK, experts);
  STD_TORCH_CHECK(top_k >= 1 && top_k <= most, "cosine_route: k between 1 and ", most, " expected, got ", top_k);
}

inline void check_route(const Tensor& x, const Tensor& anchors, const Tensor& temperature, int64_t top_k,
                        int64_t gate, const OptionalTensor& valid, const OptionalTensor& bias,
                        const OptionalTensor& noise) {
  check_vectors(x, anchors, temperature, gate);
  const int64_t experts = anchors.size(0);
  check_top_k(top_k, experts);
  check_valid(x, valid);
  STD_TORCH_CHECK(readable(bias, ScalarType::Float, {experts}, x),
                  "cosine_route: selection bias must be float32, one for each of ", experts, " experts, where x is");
  STD_TORCH_CHECK(readable(noise, ScalarType::Float, {x.size(0), experts}, x),
                  "cosine_route: noise must be float32, ", x.size(0), " x ", experts, ", contiguous and where x is");
}

// What the backward operator gets from the forward one and from upstream.
struct RouteContext {
  const Tensor &grad_gates, &grad_mean_probs, &grad_lse, &ids, &lse, &valid_count, &dots, &inverse_x, &inverse_a;
  bool fused;
};

inline void check_route_backward(const Tensor& x, const Tensor& anchors, const Tensor& temperature, int64_t gate,
                                 const OptionalTensor& valid, const RouteContext& context) {
  check_vectors(x, anchors, temperature, gate);
  check_valid(x, valid);
  const int64_t tokens = x.size(0), experts = anchors.size(0), top_k = context.ids.size(1);
  check_top_k(top_k, experts);
  const auto floats = [&](const Tensor& tensor, const std::vector<int64_t>& sizes) {
    return readable(tensor, ScalarType::Float, sizes, x);
  };
  STD_TORCH_CHECK(floats(context.grad_gates, {tokens, top_k}) && floats(context.grad_mean_probs, {experts}) &&
                      floats(context.grad_lse, {tokens}),
                  "cosine_route: gradients do not fit ", tokens, " tokens, ", experts, " experts and k ", top_k);
  STD_TORCH_CHECK(readable(context.ids, ScalarType::Long, {tokens, top_k}, x) && floats(context.lse, {tokens}) &&
                      floats(context.valid_count, {1}) &&
                      floats(context.dots, {context.fused ? 0 : tokens, experts}) && floats(context.inverse_x, {tokens}) &&
                      floats(context.inverse_a, {experts}),
                  "cosine_route: what the forward pass kept does not fit ", tokens, " tokens and ", experts,
                  " experts");
}

}  // namespace sra
