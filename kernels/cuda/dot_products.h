// Dot products of a block's 128 tokens with all anchors (up to E of them), in registers: x and anchors pass
// through shared memory in slices of 64 numbers, a few of them under way at a time.
#pragma once

#include "route_block.h"
#include "tensor_core.h"

namespace sra::cuda {

constexpr int kRows = 128, kSlice = 64;  // 8 warps of 16 rows; numbers of a row that are copied together
constexpr int kChunks = kSlice / 8;      // 16-byte chunks of such a slice

using Bits = uint16_t;  // a bfloat16

__device__ __forceinline__ float low_half(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_half(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }

// Chunk `chunk` of row `row` of a tile in shared memory, placed so that eight rows of one chunk lie in
// different banks.
__device__ __forceinline__ Bits* chunk_at(Bits* tile, int row, int chunk) {
  return tile + (row * kChunks + (chunk ^ (row & (kChunks - 1)))) * 8;
}

// A row of the accumulators; lane 4 g + q has parts of rows g and g + 8.
template <int E>
using FragmentRow = Lanes<4, E / 4, 2>;

template <int E>
struct DotProducts {
  static constexpr int kStages = E <= 128 ? 3 : 2;
  static constexpr int kStage = (kRows + E) * kSlice;  // numbers
  static constexpr size_t kBytes = sizeof(Bits) * kStages * kStage;

  const Bits* x_TD;
  const Bits* anchors_ED;
  int64_t first_row, tokens;
  int width, experts;
  Bits* stages;  // in shared memory

  __device__ __forceinline__ int slices() const { return (width + kSlice - 1) / kSlice; }
  __device__ __forceinline__ Bits* x_tile(int slice) const { return stages + slice % kStages * kStage; }
  __device__ __forceinline__ Bits* anchor_tile(int slice) const { return x_tile(slice) + kRows * kSlice; }

  // Slice `slice` of rows [begin, kRows + E) of x and anchors, x first; zeros beyond either.
  __device__ __forceinline__ void copy_slice(int slice, int begin) const {
#pragma unroll 4
    for (int i = begin * kChunks + threadIdx.x; i < (kRows + E) * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks, d = slice * kSlice + chunk * 8;
      const bool token = row < kRows;
      const int64_t t = first_row + row;
      const int e = row - kRows;
      const bool there = d < width && (token ? t < tokens : e < experts);
      const Bits* from = token ? x_TD + t * width : anchors_ED + static_cast<int64_t>(e) * width;
      copy_async(chunk_at(x_tile(slice), row, chunk), there ? from + d : x_TD, there);
    }
  }

  // body(slice) for every slice, in order, with its tiles in shared memory; rows from `begin` on are copied.
  template <class Body>
  __device__ __forceinline__ void each_slice(int begin, const Body& body) const {
    const int count = slices();
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < count) copy_slice(s, begin);
      close_copies();
    }
    for (int s = 0; s < count; ++s) {
      wait_for_copies<kStages - 2>();
      __syncthreads();
      if (s + kStages - 1 < count) copy_slice(s + kStages - 1, begin);
      close_copies();
      body(s);
    }
    wait_for_copies<0>();
    __syncthreads();  // shared memory is free again
  }

  // sums[n] are the accumulators of experts [8 n, 8 n + 8); squares those of rows g and g + 8 of x.
  __device__ __forceinline__ void find(float (&sums)[E / 8][4], float (&squares)[2]) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < E / 8; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
    squares[0] = squares[1] = 0.0f;
    each_slice(0, [&](int slice) {
#pragma unroll
      for (int step = 0; step < kSlice / 16; ++step) {
        uint32_t left[4];
        load_matrices(left, chunk_at(x_tile(slice), warp * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          squares[i % 2] += low_half(left[i]) * low_half(left[i]) + high_half(left[i]) * high_half(left[i]);
#pragma unroll
        for (int n = 0; n < E / 16; ++n) {
          uint32_t right[4];
          load_matrices(right, chunk_at(anchor_tile(slice), n * 16 + lane / 16 * 8 + lane % 8,
                                        step * 2 + lane / 8 % 2));
          multiply_add(sums[2 * n], left, right[0], right[1]);
          multiply_add(sums[2 * n + 1], left, right[2], right[3]);
        }
      }
    });
    squares[0] = sum_over<4>(squares[0]);
    squares[1] = sum_over<4>(squares[1]);
  }
};

// Row g + 8 h of the accumulators, as a row of lanes; and back.
template <int E>
__device__ __forceinline__ void take_row(const float (&sums)[E / 8][4], int h, float (&v)[E / 4]) {
#pragma unroll
  for (int j = 0; j < E / 4; ++j) v[j] = sums[j / 2][2 * h + j % 2];
}

template <int E>
__device__ __forceinline__ void put_row(const float (&v)[E / 4], int h, float (&sums)[E / 8][4]) {
#pragma unroll
  for (int j = 0; j < E / 4; ++j) sums[j / 2][2 * h + j % 2] = v[j];
}

// start(a number known when compiling: the smallest tile that holds the experts).
template <class Start>
int with_tile(int experts, const Start& start) {
  if (experts <= 32) return start(std::integral_constant<int, 32>());
  if (experts <= 64) return start(std::integral_constant<int, 64>());
  if (experts <= 128) return start(std::integral_constant<int, 128>());
  return start(std::integral_constant<int, 256>());
}

}  // namespace sra::cuda
