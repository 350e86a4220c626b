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

inline void check_route(const Tensor& x, const Tensor& anchors, const Tensor& temperature, int64_t top_k) {
  STD_TORCH_CHECK(x.dim() == 2 && anchors.dim() == 2 && x.size(1) == anchors.size(1),
                  "cosine_route: x T x D and anchors E x D expected, got ", shape(x), " and ", shape(anchors));
  const int64_t experts = anchors.size(0);
  STD_TORCH_CHECK(experts <= kMaxExperts, "cosine_route: at most ", kMaxExperts, " experts, got ", experts);
  STD_TORCH_CHECK(top_k >= 1 && top_k <= std::min<int64_t>(kMaxTopK, experts), "cosine_route: k between 1 and ",
                  std::min<int64_t>(kMaxTopK, experts), " expected, got ", top_k);
  STD_TORCH_CHECK(x.is_contiguous() && anchors.is_contiguous(), "cosine_route: contiguous inputs expected");
  STD_TORCH_CHECK(temperature.dim() == 1 && (temperature.size(0) == 1 || temperature.size(0) == experts),
                  "cosine_route: temperature of 1 or E entries expected, got ", shape(temperature), " for ",
                  experts, " experts");
  STD_TORCH_CHECK(temperature.scalar_type() == ScalarType::Float, "cosine_route: temperature must be float32");
}

}  // namespace sra
