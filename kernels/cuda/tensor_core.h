// Matrix instructions of sm_80 and later, as functions of a warp. Fragments are laid out as PTX defines for
// mma.m16n8k16: of a 16 x 8 accumulator, lane 4 g + q holds columns 2 q and 2 q + 1 of rows g and g + 8.
#ifndef SRA_CUDA_TENSOR_CORE_H
#define SRA_CUDA_TENSOR_CORE_H

#include <cuda_runtime.h>

#include <cstdint>

namespace sra::cuda {

// 16 bytes from global to shared memory in the background; zeros if not `wanted`.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool wanted) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = wanted ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

// Closes a group of copies of this thread.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits for all but the last `Open` groups of this thread.
template <int Open>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Open) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&fragments)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
               : "r"(address)
               : "memory");
}

// The same, each of the four transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&fragments)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
               : "r"(address)
               : "memory");
}

// sum (16 x 8) += left (16 x 16) * right (16 x 8), of bfloat16 numbers.
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right_0,
                                             uint32_t right_1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
}

// Two bfloat16 numbers in a word, the first in its low half.
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

}  // namespace sra::cuda

#endif
