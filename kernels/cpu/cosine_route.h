// Rows of the routing operator on the CPU. Letters: T tokens, D width, E experts, K experts per token.
#pragma once

#include <cstdint>

#include "../row_core.h"
#include "../number.h"

namespace sra::cpu {

// 1 / max(|row|, eps) of `count` rows of `width` numbers, and the rows in float32 unless `wide` is null.
void inverse_norms(const void* rows, Number type, int64_t count, int64_t width, float eps, float* inverse,
                   float* wide);

struct Scores {
  const float* dots_TE;      // x . anchor, unscaled
  const float* inverse_x_T;  // 1 / |x|
  const float* inverse_a_E;  // 1 / |anchor|
  const float* scale_E;      // |temperature| of each expert
  float largest_inverse;     // of a vector too short to have a direction, 1 / eps
  int experts, top_k;
  Gate gate;
};

struct Selection {
  const float* bias_E;    // or null
  const float* noise_TE;  // or null
  const bool* valid_T;    // or null: all tokens are valid
};

// Rows [first, last): gates_TK, ids_TK, lse_T, and sums over the valid rows of the routes and of the
// probabilities of each expert, added to load_E and probs_E.
void route_rows(const Scores& in, const Selection& selection, int64_t first, int64_t last, float* gates_TK,
                int64_t* ids_TK, float* lse_T, float* load_E, float* probs_E);

struct Upstream {
  const float* gates_TK;
  const float* probs_E;  // gradient of the mean probabilities, over the number of valid tokens
  const float* lse_T;
};

// Rows [first, last): the gradient of the dot products in grad_TE (numbers of `type`), along x in
// along_x_T, and the sum over rows of (gradient of the score x cosine), added to cosines_E.
void route_rows_backward(const Scores& in, const Upstream& upstream, const bool* valid_T,
                         const int64_t* ids_TK, const float* lse_T, int64_t first, int64_t last,
                         void* grad_TE, Number type, float* along_x_T, float* cosines_E);

// out = gradient - along[row] * rows, of `count` rows; `rows` and `out` are numbers of `type`, `gradient`
// of `gradient_type`, float32 or the same.
void subtract_along(const void* gradient, Number gradient_type, const void* rows, Number type,
                    const float* along, int64_t count, int64_t width, void* out);

}  // namespace sra::cpu
