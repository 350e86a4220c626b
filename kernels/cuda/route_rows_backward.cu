// The gradient of dot products that are in memory, in one pass over them.
#include "memory_rows.h"

namespace sra::cuda {
namespace {

template <class Row, class T>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<Row>)
    backward(const float* dots_TE, const Backward in, T* grad_TE, float* along_x_T) {
  const int E = in.sizes.experts, lane = threadIdx.x % Row::L;
  const BackwardBlock<Row> block(shared_memory(), in);
  const bool vectors = in_vectors<Row::V>(E);
  float cosines[Row::N] = {};
  each_row<Row>(in.sizes.tokens, [&](int64_t t, bool live, int place) {
    float v[Row::N];
    read_row<Row>(dots_TE, t, E, lane, vectors, v);
    const float along_x = route_row_backward<Row>(v, in.scaling.inverse_x_T[t], lane, t, live, in,
                                                  block.columns(), block.chosen[place], cosines);
    if (!live) return;
    if (lane == 0) along_x_T[t] = along_x;
#pragma unroll
    for (int j = 0; j < Row::N; j += Row::V)
      write(grad_TE + t * E, Row::column(lane, j), E, vectors,
            *reinterpret_cast<const float(*)[Row::V]>(v + j));
  });
  block.finish(cosines, in);
}

}  // namespace

int route_rows_backward(const float* dots_TE, const Backward& in, int blocks, void* grad_TE, Number type,
                        float* along_x_T, void* stream) {
  return with_lanes(in.sizes.experts, [&](auto row) {
    using Row = decltype(row);
    const size_t bytes = BackwardBlock<Row>::bytes(in.sizes.experts);
    if (type == Number::kFloat)
      return launch(backward<Row, float>, blocks, kThreads, bytes, stream, dots_TE, in, grad_TE, along_x_T);
    return launch(backward<Row, __nv_bfloat16>, blocks, kThreads, bytes, stream, dots_TE, in, grad_TE, along_x_T);
  });
}

}  // namespace sra::cuda
