// Matrix products on the CPU: one thread's work inside a parallel region, all threads' outside.
#pragma once

#include "../stable.h"

namespace sra::cpu {

// On AMD processors with AVX-512, MKL's float32 products run at half the speed of oneDNN's (Zen 5: 98
// against 215 GFLOP/s a core). SRA_ONEDNN, 0 or 1, says so of any processor.
bool onednn_is_faster();

// left @ right + bias, all of one type and without history (`detached`); a bias, or none, for each column.
Tensor product(const Tensor& left, const Tensor& right, const OptionalTensor& bias = std::nullopt);

// Rows a group should be padded to: short numbers, and float32 where oneDNN does it, go through code that
// is compiled for every number of rows it meets.
int64_t padded_rows(int64_t rows, ScalarType type);

}  // namespace sra::cpu
