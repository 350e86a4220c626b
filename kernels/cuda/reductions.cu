// What lies around the routing kernels: norms of rows, sums of the blocks' partial sums in a fixed order, and
// what is left of the gradients once products are done.
#include "cosine_route.h"
#include "vectors.h"
#include "warp.h"

namespace sra::cuda {
namespace {

constexpr int kTile = 32;  // columns, and rows at a time, of a block that sums over rows

template <class T>
__global__ void __launch_bounds__(kThreads)
    inverse_norms_of(const T* rows, int64_t count, int64_t width, float eps, float* inverse) {
  constexpr int V = 16 / sizeof(T);
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= count) return;
  const bool vectors = in_vectors<V>(width);
  float sum = 0.0f;
  for (int64_t first = lane * V; first < width; first += 32 * V) {
    float v[V];
    read(rows + row * width, first, width, vectors, 0.0f, v);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += v[j] * v[j];
  }
  sum = sum_over<32>(sum);
  if (lane == 0) inverse[row] = 1.0f / fmaxf(sqrtf(sum), eps);
}

// Sums over `count` rows of `width` numbers, of N columns for each threadIdx.x, by a block of kTile x kTile
// threads; threads with threadIdx.y == 0 get the results.
template <int N>
__device__ __forceinline__ void column_sums(const float* rows, int count, int width, const int (&columns)[N],
                                            float (&sums)[N]) {
  float* tile = reinterpret_cast<float*>(shared_memory());
  for (int n = 0; n < N; ++n) sums[n] = 0.0f;
  for (int r = threadIdx.y; r < count; r += kTile) {
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (columns[n] < width) sums[n] += rows[static_cast<int64_t>(r) * width + columns[n]];
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    tile[threadIdx.y * (kTile + 1) + threadIdx.x] = sums[n];
    __syncthreads();
    sums[n] = 0.0f;
    if (threadIdx.y == 0)
      for (int y = 0; y < kTile; ++y) sums[n] += tile[y * (kTile + 1) + threadIdx.x];
    __syncthreads();
  }
}

__global__ void statistics(const float* parts, int blocks, int experts, float* load_E, float* mean_probs_E,
                           float* valid_count) {
  const int e = blockIdx.x * kTile + threadIdx.x;
  float sums[3];  // routes, probabilities, valid tokens
  column_sums<3>(parts, blocks, 2 * experts + 1, {e, experts + e, 2 * experts}, sums);
  if (threadIdx.y > 0) return;
  if (e < experts) {
    load_E[e] = sums[0];
    mean_probs_E[e] = sums[1] / fmaxf(1.0f, sums[2]);
  }
  if (e == 0) *valid_count = sums[2];
}

__global__ void sum_parts(const float* parts, int blocks, int experts, float* sums_E) {
  const int e = blockIdx.x * kTile + threadIdx.x;
  float sum[1];
  column_sums<1>(parts, blocks, experts, {e}, sum);
  if (threadIdx.y == 0 && e < experts) sums_E[e] = sum[0];
}

template <class T>
__global__ void __launch_bounds__(kThreads) subtract_along_of(const float* gradient, const T* rows,
                                                              const float* along, int64_t count, int64_t width,
                                                              T* out) {
  constexpr int V = 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= count) return;
  const bool vectors = in_vectors<V>(width);
  const float factor = along[row];
  for (int64_t first = threadIdx.x % 32 * V; first < width; first += 32 * V) {
    float g[V], x[V];
    read(gradient + row * width, first, width, vectors, 0.0f, g);
    read(rows + row * width, first, width, vectors, 0.0f, x);
#pragma unroll
    for (int j = 0; j < V; ++j) g[j] -= factor * x[j];
    write(out + row * width, first, width, vectors, g);
  }
}

__device__ __forceinline__ float sign(float value) { return (value > 0.0f) - (value < 0.0f); }

// From the sums of (gradient of the score x cosine): the gradient along each anchor, in its place, and of
// the temperature.
__global__ void __launch_bounds__(kThreads)
    scale_gradients(float* cosines_E, int experts, const Scaling scaling, int temperatures, float* grad_temperature) {
  if (temperatures == 1) {
    float sum = 0.0f;
    for (int e = threadIdx.x % 32; e < experts; e += 32) sum += cosines_E[e];
    sum = sum_over<32>(sum);
    if (threadIdx.x == 0) grad_temperature[0] = sum * sign(scaling.temperature[0]);
    __syncthreads();
  }
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    const float sum = cosines_E[e], inverse = scaling.inverse_a_E[e];
    const float temperature = scaling.temperature[e * scaling.stride];
    if (temperatures > 1) grad_temperature[e] = sum * sign(temperature);
    cosines_E[e] = inverse < scaling.largest_inverse ? sum * fabsf(temperature) * inverse * inverse : 0.0f;
  }
}

// start(a null pointer to numbers of that type).
template <class Start>
int with_numbers(Number type, const Start& start) {
  if (type == Number::kFloat) return start(static_cast<float*>(nullptr));
  if (type == Number::kBFloat16) return start(static_cast<__nv_bfloat16*>(nullptr));
  return start(static_cast<__half*>(nullptr));
}

unsigned blocks_of(int64_t count, int each) { return static_cast<unsigned>((count + each - 1) / each); }

constexpr size_t kTileBytes = kTile * (kTile + 1) * sizeof(float);

}  // namespace

int inverse_norms(const void* rows, Number type, int64_t count, int64_t width, float eps, float* inverse,
                  void* stream) {
  return with_numbers(type, [&](auto* number) {
    using T = std::remove_pointer_t<decltype(number)>;
    return launch(inverse_norms_of<T>, blocks_of(count, kWarps), kThreads, 0, stream, static_cast<const T*>(rows),
                  count, width, eps, inverse);
  });
}

int sum_statistics(const float* parts, int blocks, int experts, float* load_E, float* mean_probs_E,
                   float* valid_count, void* stream) {
  return launch(statistics, blocks_of(experts, kTile), dim3(kTile, kTile), kTileBytes, stream, parts, blocks,
                experts, load_E, mean_probs_E, valid_count);
}

int subtract_along(const float* gradient, const void* rows, Number type, const float* along, int64_t count,
                   int64_t width, void* out, void* stream) {
  return with_numbers(type, [&](auto* number) {
    using T = std::remove_pointer_t<decltype(number)>;
    return launch(subtract_along_of<T>, blocks_of(count, kWarps), kThreads, 0, stream, gradient,
                  static_cast<const T*>(rows), along, count, width, static_cast<T*>(out));
  });
}

int finish_anchors(const float* gradient_ED, const void* anchors_ED, Number type, int width, const float* parts,
                   int blocks, int experts, const Scaling& scaling, int temperatures, float* cosines_E,
                   void* grad_anchors_ED, float* grad_temperature, void* stream) {
  int error = launch(sum_parts, blocks_of(experts, kTile), dim3(kTile, kTile), kTileBytes, stream, parts, blocks,
                     experts, cosines_E);
  if (error == 0)
    error = launch(scale_gradients, 1, kThreads, 0, stream, cosines_E, experts, scaling, temperatures,
                   grad_temperature);
  if (error != 0) return error;
  return subtract_along(gradient_ED, anchors_ED, type, cosines_E, experts, width, grad_anchors_ED, stream);
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace sra::cuda
