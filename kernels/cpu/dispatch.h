// Rows on their way to the experts and back, on the CPU. Letters: T tokens, K routes per token, D width;
// place_TK[t * K + k] is the row of route k of token t among the rows in expert order.
#pragma once

#include <cstdint>

#include "../number.h"

namespace sra::cpu {

struct Routes {
  const int64_t* place_TK;
  int64_t per_token, width;
};

// Tokens [first, last): each to the rows of its routes.
void spread_rows(Number type, const Routes& routes, const void* x_TD, int64_t first, int64_t last, void* rows_RD);

// Tokens [first, last): the sum of the rows of their routes, times gates_TK unless that is null, in float32.
void sum_rows(Number type, const Routes& routes, const void* rows_RD, const float* gates_TK, int64_t first,
              int64_t last, void* out_TD);

// The gradients of that sum to rows and gates.
void sum_rows_backward(Number type, const Routes& routes, const void* grad_TD, const void* rows_RD,
                       const float* gates_TK, int64_t first, int64_t last, void* grad_RD, float* grad_gates_TK);

}  // namespace sra::cpu
