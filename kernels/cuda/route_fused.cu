// Routing in one pass over x: dot products and norms by tensor cores, then rows where they lie.
#include "dot_products.h"

namespace sra::cuda {
namespace {

template <int E>
__global__ void __launch_bounds__(kThreads, E <= 128 ? 2 : 1)
    forward(const Bits* x_TD, const Bits* anchors_ED, int width, const Forward in) {
  using Row = FragmentRow<E>;
  const int64_t tokens = in.sizes.tokens, first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t first = first_row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;  // and first + 8: this lane's
  const int experts = in.sizes.experts, group = threadIdx.x / 4, lane = threadIdx.x % 4;
  float sums[E / 8][4], squares[2];
  const DotProducts<E> dots{x_TD, anchors_ED, first_row, tokens, width, experts,
                            reinterpret_cast<Bits*>(shared_memory())};
  dots.find(sums, squares);
  const ForwardBlock<Row> block(shared_memory(), in);
  float inverse_x[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    inverse_x[h] = fminf(1.0f / sqrtf(squares[h]), in.scaling.largest_inverse);
    if (first + h * 8 < tokens && lane == 0) in.scaling.inverse_x_T[first + h * 8] = inverse_x[h];
  }
#pragma unroll
  for (int j = 0; j < Row::N; ++j) {
    const int e = Row::column(lane, j);
    const float to_score = e < experts ? block.to_score_E[e] : 0.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& sum = sums[j / 2][2 * h + j % 2];
      sum = e < experts ? sum * inverse_x[h] * to_score : -INFINITY;
    }
  }
  int counted = 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t t = first + h * 8;
    const bool live = t < tokens;
    float v[Row::N];
    take_row<E>(sums, h, v);
    counted += route_row<Row>(v, lane, live ? t : tokens - 1, live, in, block.chosen[group], block.routes_E);
    put_row<E>(v, h, sums);
  }
  float probs[Row::N];
#pragma unroll
  for (int j = 0; j < Row::N; ++j) probs[j] = sums[j / 2][j % 2] + sums[j / 2][2 + j % 2];
  block.finish(probs, counted, in);
}

}  // namespace

int fused_blocks(const Sizes& sizes) { return static_cast<int>((sizes.tokens + kRows - 1) / kRows); }

int route_fused(const void* x_TD, const void* anchors_ED, int width, const Forward& in, void* stream) {
  return with_tile(in.sizes.experts, [&](auto tile) {
    constexpr int E = decltype(tile)::value;
    return launch(forward<E>, fused_blocks(in.sizes), kThreads, DotProducts<E>::kBytes, stream, x_TD, anchors_ED,
                  width, in);
  });
}

}  // namespace sra::cuda
