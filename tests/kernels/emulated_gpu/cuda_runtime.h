// CUDA's runtime on a CPU, for tests: the kernels' own sources, one block after the other. A thread is a fiber
// that runs until it meets a barrier; a warp's instructions are barriers of 32 fibers. What real hardware
// would leave undefined stops the program: lanes that do not meet, memory read before it was copied.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t : int { cudaSuccess = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "the emulated GPU knows no errors"; }

extern dim3 threadIdx, blockIdx, gridDim;

namespace emulated {

extern unsigned char* shared;

constexpr size_t kMostShared = 99 * 1024;  // of a block, on the smallest of the GPUs meant
constexpr size_t kOperand = 64;            // bytes a lane may bring to an instruction of its warp

void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
void block_barrier();

// Brings `bytes` of `operand`, waits for the other lanes, and returns the operands of all 32, kOperand bytes
// each. `kind` tells instructions apart.
const unsigned char* meet(const char* kind, const void* operand, size_t bytes);
int lane();

// Copies in the background are done as late as is allowed.
void copy_later(void* to, const void* from, bool wanted);
void close_copies();
void wait_for_copies(int open);

template <class T>
T operand_of(const unsigned char* operands, int lane) {
  T value;
  std::memcpy(&value, operands + lane * kOperand, sizeof value);
  return value;
}

}  // namespace emulated

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  emulated::run(*config, [&] { kernel(arguments...); });
  return cudaSuccess;
}

inline void __syncthreads() { emulated::block_barrier(); }
inline void __syncwarp() { emulated::meet("syncwarp", nullptr, 0); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::operand_of<T>(emulated::meet("shuffle", &value, sizeof value), emulated::lane() ^ mask);
}

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

inline float __expf(float x) { return std::exp(x); }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

namespace sra::cuda {

inline unsigned char* shared_memory() { return emulated::shared; }
inline void computed_anew(float&) {}

}  // namespace sra::cuda
