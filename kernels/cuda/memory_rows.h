// Rows whose dot products are in memory: which lanes take them, and reading them.
#pragma once

#include "route_block.h"
#include "vectors.h"

namespace sra::cuda {

constexpr int kFew = 4;  // numbers a lane reads together

template <class Row>
__device__ __forceinline__ void read_row(const float* dots_TE, int64_t t, int experts, int lane, bool vectors,
                                         float (&v)[Row::N]) {
#pragma unroll
  for (int j = 0; j < Row::N; j += Row::V)
    read(dots_TE + t * experts, Row::column(lane, j), experts, vectors, 0.0f,
         *reinterpret_cast<float(*)[Row::V]>(v + j));
}

// Calls row(t, live, its place among the block's rows) for the warp's share of rows.
template <class Row, class Body>
__device__ __forceinline__ void each_row(int64_t tokens, const Body& body) {
  constexpr int kTogether = 32 / Row::L;
  const int place = threadIdx.x / 32 * kTogether + threadIdx.x % 32 / Row::L;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps * kTogether;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps * kTogether;
  for (int64_t start = first; start < tokens; start += step) {
    const int64_t t = start + place;
    body(t < tokens ? t : tokens - 1, t < tokens, place);
  }
}

// How many blocks of such a kernel share a multiprocessor.
template <class Row>
constexpr int kBlocksTogether = Row::N <= 16 ? 2 : 1;

// start(a kind of Lanes) for the smallest that holds the row.
template <class Start>
int with_lanes(int experts, const Start& start) {
  if (experts <= 32) return start(Lanes<4, 8, kFew>());
  if (experts <= 128) return start(Lanes<8, 16, kFew>());
  if (experts <= 256) return start(Lanes<16, 16, kFew>());
  if (experts <= 512) return start(Lanes<32, 16, kFew>());
  if (experts <= 1024) return start(Lanes<32, 32, kFew>());
  if (experts <= 2048) return start(Lanes<32, 64, kFew>());
  return start(Lanes<32, 128, kFew>());
}

}  // namespace sra::cuda
