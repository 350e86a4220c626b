// Takes the place of kernels/cuda/tensor_core.h: the same functions, by PTX's definition of the fragments.
#pragma once
#define SRA_CUDA_TENSOR_CORE_H

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace sra::cuda {

inline float half_of(uint32_t word, int which) {
  return cpu::BFloat16{static_cast<uint16_t>(word >> (16 * which))};
}

inline void copy_async(void* shared, const void* global, bool wanted) {
  emulated::copy_later(shared, global, wanted);
}
inline void close_copies() { emulated::close_copies(); }
template <int Open>
void wait_for_copies() {
  emulated::wait_for_copies(Open);
}

// Element `column` of row `row` of the 8 x 8 matrix `m`.
inline uint16_t element(const unsigned char* operands, int m, int row, int column) {
  return emulated::operand_of<const uint16_t*>(operands, m * 8 + row)[column];
}

inline void load_matrices(uint32_t (&fragments)[4], const void* row) {
  const unsigned char* rows = emulated::meet("ldmatrix", &row, sizeof row);
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  for (int m = 0; m < 4; ++m)
    fragments[m] = element(rows, m, g, 2 * q) | static_cast<uint32_t>(element(rows, m, g, 2 * q + 1)) << 16;
}

inline void load_transposed(uint32_t (&fragments)[4], const void* row) {
  const unsigned char* rows = emulated::meet("ldmatrix.trans", &row, sizeof row);
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  for (int m = 0; m < 4; ++m)
    fragments[m] = element(rows, m, 2 * q, g) | static_cast<uint32_t>(element(rows, m, 2 * q + 1, g)) << 16;
}

struct Factors {
  uint32_t left[4], right[2];
};

inline void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right_0, uint32_t right_1) {
  const Factors mine{{left[0], left[1], left[2], left[3]}, {right_0, right_1}};
  const unsigned char* operands = emulated::meet("mma", &mine, sizeof mine);
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  Factors of[32];
  for (int lane = 0; lane < 32; ++lane) of[lane] = emulated::operand_of<Factors>(operands, lane);
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * q + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t a = of[row % 8 * 4 + k % 8 / 2].left[row / 8 + k / 8 * 2];
      const uint32_t b = of[column * 4 + k % 8 / 2].right[k / 8];
      sum[i] += half_of(a, k % 2) * half_of(b, k % 2);
    }
  }
}

inline uint32_t pack(float first, float second) {
  return cpu::BFloat16::nearest(first).bits | static_cast<uint32_t>(cpu::BFloat16::nearest(second).bits) << 16;
}

}  // namespace sra::cuda
