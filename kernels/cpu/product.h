// Matrix products on the CPU: one thread's work inside a parallel region, all threads' outside.
#pragma once

#include "../stable.h"

namespace sra::cpu {

// left @ right, two matrices of one type without history (`detached`).
Tensor product(const Tensor& left, const Tensor& right);

// Rows a group should be padded to: short numbers, and float32 where oneDNN does it, go through code that
// is compiled for every number of rows it meets.
int64_t padded_rows(int64_t rows, ScalarType type);

}  // namespace sra::cpu
