// Sums and searches over the lanes of a warp, shared memory, and launching.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../lanes.h"

namespace sra::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr size_t kAlwaysShared = 48 * 1024;  // bytes of shared memory a block has without asking

// Over groups of L neighbouring lanes; every lane gets the result.
template <int L>
__device__ __forceinline__ float sum_over(float value) {
#pragma unroll
  for (int o = L / 2; o > 0; o >>= 1) value += __shfl_xor_sync(kWholeWarp, value, o);
  return value;
}

template <int L>
__device__ __forceinline__ float max_over(float value) {
#pragma unroll
  for (int o = L / 2; o > 0; o >>= 1) value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, o));
  return value;
}

template <int L>
__device__ __forceinline__ Candidate best_over(Candidate best) {
#pragma unroll
  for (int o = L / 2; o > 0; o >>= 1) {
    const Candidate other{__shfl_xor_sync(kWholeWarp, best.value, o), __shfl_xor_sync(kWholeWarp, best.id, o),
                          __shfl_xor_sync(kWholeWarp, best.score, o)};
    best = better_of(best, other);
  }
  return best;
}

#ifdef __CUDACC__
// Makes the compiler compute what follows from `value` again, instead of keeping it in registers over a loop.
__device__ __forceinline__ void computed_anew(float& value) { asm volatile("" : "+f"(value)); }

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}
#endif

// Starts kernel(arguments...) on `stream`; returns cudaSuccess or the error.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes, void* stream,
           const Arguments&... arguments) {
  if (blocks.x == 0) return cudaSuccess;
  if (shared_bytes > kAlwaysShared) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace sra::cuda
