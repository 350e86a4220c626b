// Kernels of the routing operator on a GPU, for callers without a CUDA compiler. All pointers are to the
// device's memory; functions start work on `stream` and return 0 or CUDA's error. Letters: T tokens, D width,
// E experts, K experts per token.
#pragma once

#include <cstdint>

#include "../number.h"
#include "../row_core.h"

namespace sra::cuda {

constexpr int kFusedExperts = 256;  // the most that the fused kernels take

struct Sizes {
  int64_t tokens;
  int experts, top_k;
  Gate gate;
};

// What scales a dot product to a score: |temperature| / (|x| |a|).
struct Scaling {
  float* inverse_x_T;
  const float* inverse_a_E;
  const float* temperature;  // entry e * stride is of expert e
  int stride;
  float largest_inverse;  // of a vector too short to have a direction
};

struct Forward {
  Sizes sizes;
  Scaling scaling;
  const float* bias_E;    // or null
  const float* noise_TE;  // or null
  const bool* valid_T;    // or null: all tokens are valid
  float* gates_TK;
  int64_t* ids_TK;
  float* lse_T;
  float* parts;  // blocks x (2E + 1): routes, probabilities and valid tokens
};

struct Backward {
  Sizes sizes;
  Scaling scaling;
  const float* grad_gates_TK;
  const float* grad_mean_probs_E;
  const float* grad_lse_T;
  const bool* valid_T;  // or null
  const float* valid_count;
  const int64_t* ids_TK;
  const float* lse_T;
  float* parts;  // blocks x E: sums over tokens of (gradient of the score x cosine)
};

// 1 / max(|row|, eps) of `count` rows.
int inverse_norms(const void* rows, Number type, int64_t count, int64_t width, float eps, float* inverse,
                  void* stream);

// Any E: from dot products that are there. `blocks` rows of `parts` are written, and backward the gradient
// along x, for `subtract_along`.
int row_blocks(const Sizes& sizes);
int route_rows(const float* dots_TE, const Forward& in, int blocks, void* stream);
int route_rows_backward(const float* dots_TE, const Backward& in, int blocks, void* grad_TE, Number type,
                        float* along_x_T, void* stream);

// E <= kFusedExperts, bfloat16, D a multiple of 8, aligned to 16 bytes: dot products stay on the chip. The
// forward kernel finds the inverse norms of x, the backward kernel the gradient of x.
int fused_blocks(const Sizes& sizes);
int route_fused(const void* x_TD, const void* anchors_ED, int width, const Forward& in, void* stream);
int route_fused_backward(const void* x_TD, const void* anchors_ED, int width, const Backward& in, void* grad_TE,
                         void* grad_x_TD, void* stream);

// load_E, mean_probs_E and valid_count from the parts of all blocks.
int sum_statistics(const float* parts, int blocks, int experts, float* load_E, float* mean_probs_E,
                   float* valid_count, void* stream);

// out = gradient - along[row] * rows, of `count` rows.
int subtract_along(const float* gradient, const void* rows, Number type, const float* along, int64_t count,
                   int64_t width, void* out, void* stream);

// From the gradient through dot products, and the parts of all blocks: the gradients of anchors and of the
// temperature (of `temperatures` entries).
int finish_anchors(const float* gradient_ED, const void* anchors_ED, Number type, int width, const float* parts,
                   int blocks, int experts, const Scaling& scaling, int temperatures, float* cosines_E,
                   void* grad_anchors_ED, float* grad_temperature, void* stream);

const char* error_text(int error);

}  // namespace sra::cuda
