// Neighbouring numbers of a row as one access of up to 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sra::cuda {

__device__ __forceinline__ float wide(float value) { return value; }
__device__ __forceinline__ float wide(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float wide(__half value) { return __half2float(value); }

template <class T>
__device__ __forceinline__ T nearest(float value);
template <>
__device__ __forceinline__ float nearest<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 nearest<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half nearest<__half>(float value) {
  return __float2half_rn(value);
}

template <class T, int V>
struct alignas(V * sizeof(T)) Vector {
  T number[V];
};

// Whether every row of `width` numbers can be read V at a time.
template <int V>
__host__ __device__ __forceinline__ bool in_vectors(int64_t width) {
  return width % V == 0;
}

// row[first .. first + V), and `beyond` from `width` on; `vectors` is in_vectors<V>(width).
template <int V, class T>
__device__ __forceinline__ void read(const T* row, int first, int width, bool vectors, float beyond,
                                     float (&out)[V]) {
  if (vectors && first < width) {
    const Vector<T, V> found = *reinterpret_cast<const Vector<T, V>*>(row + first);
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = wide(found.number[v]);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = first + v < width ? wide(row[first + v]) : beyond;
  }
}

template <int V, class T>
__device__ __forceinline__ void write(T* row, int first, int width, bool vectors, const float (&numbers)[V]) {
  if (vectors && first < width) {
    Vector<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.number[v] = nearest<T>(numbers[v]);
    *reinterpret_cast<Vector<T, V>*>(row + first) = out;
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (first + v < width) row[first + v] = nearest<T>(numbers[v]);
  }
}

}  // namespace sra::cuda
