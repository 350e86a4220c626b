// Rows between the two products of an expert on the CPU. Letters: n rows, F hidden width. The hidden layer
// is `up` alone with gelu (tanh form), or silu(gate) * up (SwiGLU).
#pragma once

#include <cstdint>

#include "../number.h"

namespace sra::cpu {

// n x F each; `gate` is null for gelu.
struct Hidden {
  void* gate;
  void* up;
  int64_t width;
};

// active = activation(hidden), after the bias (or null) was added to up in place.
void activate(Number type, const Hidden& hidden, const void* bias, int64_t n, void* active);

// Active again, and the gradient of hidden from that of active, which `grad` may overwrite.
void activate_backward(Number type, const Hidden& hidden, const void* grad_active, int64_t n, void* active,
                       const Hidden& grad);

// rows += bias, n x width.
void add_bias(Number type, const void* bias, int64_t n, int64_t width, void* rows);

// sum += rows, n numbers.
void add_rows(Number type, const void* rows, int64_t n, void* sum);

// sums[c] = sum of column c over n rows, in float32.
void sum_columns(Number type, const void* rows, int64_t n, int64_t width, void* sums);

}  // namespace sra::cpu
