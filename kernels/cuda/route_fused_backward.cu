// The gradient of routing in one pass over x: dot products again, their gradient where they lie, and with it
// the gradient of x. The gradient of dot products is written too, for that of the anchors.
#include "dot_products.h"

namespace sra::cuda {
namespace {

__device__ __forceinline__ void write_pair(Bits* row, int first, int width, uint32_t word) {
  if (width % 2 == 0) {
    if (first < width) *reinterpret_cast<uint32_t*>(row + first) = word;
  } else {
    if (first < width) row[first] = static_cast<Bits>(word);
    if (first + 1 < width) row[first + 1] = static_cast<Bits>(word >> 16);
  }
}

template <int E>
__global__ void __launch_bounds__(kThreads, E <= 32 ? 2 : 1)
    backward(const Bits* x_TD, const Bits* anchors_ED, int width, const Backward in, Bits* grad_TE,
             Bits* grad_x_TD) {
  using Row = FragmentRow<E>;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows, tokens = in.sizes.tokens;
  const int experts = in.sizes.experts, lane = threadIdx.x % 32, group = threadIdx.x / 4;
  const DotProducts<E> dots{x_TD, anchors_ED, first_row, tokens, width, experts,
                            reinterpret_cast<Bits*>(shared_memory())};
  const int64_t first = first_row + threadIdx.x / 32 * 16 + lane / 4;  // and first + 8 are this lane's rows
  // The gradient of dot products: experts 8 n + 2 q and the next, of both rows. A left factor as it lies.
  uint32_t words[E / 8][2];
  float along[2];
  {
    float sums[E / 8][4], squares[2];
    dots.find(sums, squares);
    const BackwardBlock<Row> block(shared_memory(), in);
    float cosines[Row::N] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool live = first + h * 8 < tokens;
      const int64_t t = live ? first + h * 8 : tokens - 1;
#pragma unroll
      for (int i = 0; i < E / 2; ++i) computed_anew(sums[i / 4][i % 4]);  // one row after the other
      float v[Row::N];
      take_row<E>(sums, h, v);
      along[h] = route_row_backward<Row>(v, in.scaling.inverse_x_T[t], lane % 4, t, live, in, block.columns(),
                                         block.chosen[group], cosines);
#pragma unroll
      for (int n = 0; n < E / 8; ++n) words[n][h] = pack(v[2 * n], v[2 * n + 1]);
    }
    block.finish(cosines, in);
  }
#pragma unroll
  for (int n = 0; n < E / 8; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t t = first + h * 8;
      if (t < tokens) write_pair(grad_TE + t * experts, n * 8 + lane % 4 * 2, experts, words[n][h]);
    }
  }
  dots.each_slice(kRows, [&](int slice) {
    float sums[kSlice / 8][4];
#pragma unroll
    for (int n = 0; n < kSlice / 8; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
#pragma unroll
    for (int step = 0; step < E / 16; ++step) {
      const uint32_t left[4] = {words[2 * step][0], words[2 * step][1], words[2 * step + 1][0],
                                words[2 * step + 1][1]};
#pragma unroll
      for (int n = 0; n < kSlice / 16; ++n) {
        uint32_t right[4];
        load_transposed(right, chunk_at(dots.anchor_tile(slice), step * 16 + lane % 16, n * 2 + lane / 16));
        multiply_add(sums[2 * n], left, right[0], right[1]);
        multiply_add(sums[2 * n + 1], left, right[2], right[3]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t t = first + h * 8;
      if (t >= tokens) continue;
#pragma unroll
      for (int n = 0; n < kSlice / 8; ++n) {
        const int d = slice * kSlice + n * 8 + lane % 4 * 2;
        if (d >= width) continue;
        const uint32_t x = __ldg(reinterpret_cast<const uint32_t*>(x_TD + t * width + d));
        *reinterpret_cast<uint32_t*>(grad_x_TD + t * width + d) =
            pack(sums[n][2 * h] - along[h] * low_half(x), sums[n][2 * h + 1] - along[h] * high_half(x));
      }
    }
  });
}

}  // namespace

int route_fused_backward(const void* x_TD, const void* anchors_ED, int width, const Backward& in, void* grad_TE,
                         void* grad_x_TD, void* stream) {
  return with_tile(in.sizes.experts, [&](auto tile) {
    constexpr int E = decltype(tile)::value;
    return launch(backward<E>, fused_blocks(in.sizes), kThreads, DotProducts<E>::kBytes, stream, x_TD, anchors_ED,
                  width, in, grad_TE, grad_x_TD);
  });
}

}  // namespace sra::cuda
