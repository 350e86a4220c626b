// What a block keeps in shared memory while its lanes go through rows, and what it writes at the end.
#pragma once

#include "route_row.h"

namespace sra::cuda {

// Sums of all lanes' columns in sums_E, in the order of warps.
template <class Row>
__device__ __forceinline__ void add_up(float (&columns)[Row::N], int experts, float* sums_E) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < Row::N; ++j) {
#pragma unroll
    for (int o = 16; o >= Row::L; o >>= 1) columns[j] += __shfl_xor_sync(kWholeWarp, columns[j], o);
  }
  for (int e = threadIdx.x; e < experts; e += kThreads) sums_E[e] = 0.0f;
  for (int w = 0; w < kWarps; ++w) {
    __syncthreads();
    if (w != warp || lane >= Row::L) continue;
#pragma unroll
    for (int j = 0; j < Row::N; ++j) {
      const int e = Row::column(lane, j);
      if (e < experts) sums_E[e] += columns[j];
    }
  }
  __syncthreads();
}

template <class Row>
struct ForwardBlock {
  Chosen* chosen;  // one for each row that is under way
  float *sums_E, *to_score_E;
  int *routes_E, *valid;

  __device__ __forceinline__ ForwardBlock(unsigned char* shared, const Forward& in)
      : chosen(reinterpret_cast<Chosen*>(shared)) {
    const int E = in.sizes.experts;
    sums_E = reinterpret_cast<float*>(chosen + kThreads / Row::L);
    to_score_E = sums_E + E;
    routes_E = reinterpret_cast<int*>(to_score_E + E);
    valid = routes_E + E;
    for (int e = threadIdx.x; e < E; e += kThreads) {
      to_score_E[e] = in.scaling.inverse_a_E[e] * fabsf(in.scaling.temperature[e * in.scaling.stride]);
      routes_E[e] = 0;
    }
    if (threadIdx.x == 0) *valid = 0;
    __syncthreads();
  }

  static size_t bytes(int experts) {
    return kThreads / Row::L * sizeof(Chosen) + (3 * experts + 1) * sizeof(float);
  }

  // Writes the block's row of `Forward::parts` from the probabilities and the tokens its lanes have counted.
  __device__ __forceinline__ void finish(float (&probs)[Row::N], int counted, const Forward& in) const {
    const int E = in.sizes.experts;
    if (counted) atomicAdd(valid, counted);
    add_up<Row>(probs, E, sums_E);
    float* part = in.parts + static_cast<int64_t>(blockIdx.x) * (2 * E + 1);
    for (int e = threadIdx.x; e < E; e += kThreads) {
      part[e] = static_cast<float>(routes_E[e]);
      part[E + e] = sums_E[e];
    }
    if (threadIdx.x == 0) part[2 * E] = static_cast<float>(*valid);
  }
};

template <class Row>
struct BackwardBlock {
  Chosen* chosen;
  float *sums_E, *inverse_a_E, *scale_E, *grad_probs_E;

  __device__ __forceinline__ BackwardBlock(unsigned char* shared, const Backward& in)
      : chosen(reinterpret_cast<Chosen*>(shared)) {
    const int E = in.sizes.experts;
    sums_E = reinterpret_cast<float*>(chosen + kThreads / Row::L);
    inverse_a_E = sums_E + E;
    scale_E = inverse_a_E + E;
    grad_probs_E = scale_E + E;
    const float per_token = 1.0f / fmaxf(1.0f, *in.valid_count);
    for (int e = threadIdx.x; e < E; e += kThreads) {
      inverse_a_E[e] = in.scaling.inverse_a_E[e];
      scale_E[e] = fabsf(in.scaling.temperature[e * in.scaling.stride]);
      grad_probs_E[e] = in.grad_mean_probs_E[e] * per_token;
    }
    __syncthreads();
  }

  static size_t bytes(int experts) { return kThreads / Row::L * sizeof(Chosen) + 4 * experts * sizeof(float); }

  __device__ __forceinline__ Columns columns() const { return {inverse_a_E, scale_E, grad_probs_E}; }

  // Writes the block's row of `Backward::parts`; then shared memory is free again.
  __device__ __forceinline__ void finish(float (&cosines)[Row::N], const Backward& in) const {
    const int E = in.sizes.experts;
    add_up<Row>(cosines, E, sums_E);
    for (int e = threadIdx.x; e < E; e += kThreads) in.parts[static_cast<int64_t>(blockIdx.x) * E + e] = sums_E[e];
    __syncthreads();
  }
};

}  // namespace sra::cuda
