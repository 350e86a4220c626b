// Routing from dot products that are in memory, for every number of experts, in one pass over them. A warp
// takes 32 / L rows at a time, a block as many as its share of the tokens.
#include <algorithm>

#include "memory_rows.h"

namespace sra::cuda {
namespace {

constexpr int kMostBlocks = 512;  // rows of partial sums

template <class Row>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<Row>) forward(const float* dots_TE, const Forward in) {
  const int E = in.sizes.experts, lane = threadIdx.x % Row::L;
  const ForwardBlock<Row> block(shared_memory(), in);
  const bool vectors = in_vectors<Row::V>(E);
  float probs[Row::N] = {};
  int counted = 0;
  each_row<Row>(in.sizes.tokens, [&](int64_t t, bool live, int place) {
    float v[Row::N];
    read_row<Row>(dots_TE, t, E, lane, vectors, v);
    const float inverse_x = in.scaling.inverse_x_T[t];
#pragma unroll
    for (int j = 0; j < Row::N; ++j) {
      const int e = Row::column(lane, j);
      v[j] = e < E ? v[j] * inverse_x * block.to_score_E[e] : -INFINITY;
    }
    counted += route_row<Row>(v, lane, t, live, in, block.chosen[place], block.routes_E);
#pragma unroll
    for (int j = 0; j < Row::N; ++j) probs[j] += v[j];
  });
  block.finish(probs, counted, in);
}

}  // namespace

int row_blocks(const Sizes& sizes) {
  return with_lanes(sizes.experts, [&](auto row) {
    constexpr int kTogether = kThreads / decltype(row)::L;
    return static_cast<int>(std::min<int64_t>(kMostBlocks, (sizes.tokens + kTogether - 1) / kTogether));
  });
}

int route_rows(const float* dots_TE, const Forward& in, int blocks, void* stream) {
  return with_lanes(in.sizes.experts, [&](auto row) {
    using Row = decltype(row);
    return launch(forward<Row>, blocks, kThreads, ForwardBlock<Row>::bytes(in.sizes.experts), stream, dots_TE, in);
  });
}

}  // namespace sra::cuda
