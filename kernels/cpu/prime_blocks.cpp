#include "prime_blocks.h"

#include <algorithm>

#include "numbers.h"

namespace sra::cpu {
namespace {

typedef float Vector __attribute__((vector_size(64), aligned(4)));
constexpr int64_t kLanes = 16, kVectors = kVectorTokens / kLanes, kTile = 16;

SRA_INLINE Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
SRA_INLINE void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

// A matrix whose entry (m, k) is at[m * row + k * column].
struct Weights {
  const float* at;
  int64_t row, column;
};

// Every p-th channel from r on.
template <class Number>
SRA_INLINE Channels<Number> of_residue(Channels<Number> all, int64_t p, int64_t r) {
  return {all.at + r * all.apart, p * all.apart};
}

// M rows of y: y[m] += sum_k w(m, k) x[k], kVectorTokens tokens.
template <int M>
SRA_INLINE void add_rows_of(const Weights& w, Channels<const float> x, Channels<float> y, int64_t inputs) {
  Vector sum[M][kVectors];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kVectors; ++v) sum[m][v] = load(y.at + m * y.apart + v * kLanes);
  for (int64_t k = 0; k < inputs; ++k) {
    Vector own[kVectors];
    for (int v = 0; v < kVectors; ++v) own[v] = load(x.at + k * x.apart + v * kLanes);
    for (int m = 0; m < M; ++m) {
      const float weight = w.at[m * w.row + k * w.column];
      for (int v = 0; v < kVectors; ++v) sum[m][v] += weight * own[v];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kVectors; ++v) store(y.at + m * y.apart + v * kLanes, sum[m][v]);
}

// y[i] += sum_k w(i, k) x[k] for all outputs of a residue.
SRA_INLINE void add_block(const Weights& w, Channels<const float> x, Channels<float> y, int64_t outputs,
                          int64_t inputs) {
  int64_t i = 0;
  const auto rows = [&] { return Weights{w.at + i * w.row, w.row, w.column}; };
  const auto sums = [&] { return Channels<float>{y.at + i * y.apart, y.apart}; };
  for (; i + 6 <= outputs; i += 6) add_rows_of<6>(rows(), x, sums(), inputs);
  for (; i + 2 <= outputs; i += 2) add_rows_of<2>(rows(), x, sums(), inputs);
  for (; i < outputs; ++i) add_rows_of<1>(rows(), x, sums(), inputs);
}

// w(m, n) += y[m] . x[n] over the tokens.
template <int M, int N>
SRA_INLINE void add_dots(Channels<const float> y, Channels<const float> x, int64_t tokens, float* w, int64_t row,
                         int64_t column) {
  Vector sum[M][N] = {};
  for (int64_t t = 0; t < tokens; t += kLanes) {
    Vector own[N];
    for (int n = 0; n < N; ++n) own[n] = load(x.at + n * x.apart + t);
    for (int m = 0; m < M; ++m) {
      const Vector output = load(y.at + m * y.apart + t);
      for (int n = 0; n < N; ++n) sum[m][n] += output * own[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float total = 0.0f;
      for (int lane = 0; lane < kLanes; ++lane) total += sum[m][n][lane];
      w[m * row + n * column] += total;
    }
}

template <int M>
SRA_INLINE void add_strip(Channels<const float> y, Channels<const float> x, int64_t tokens, float* w, int64_t row,
                          int64_t column, int64_t inputs) {
  int64_t j = 0;
  for (; j + 4 <= inputs; j += 4)
    add_dots<M, 4>(y, {x.at + j * x.apart, x.apart}, tokens, w + j * column, row, column);
  for (; j < inputs; ++j)
    add_dots<M, 1>(y, {x.at + j * x.apart, x.apart}, tokens, w + j * column, row, column);
}

}  // namespace

SRA_CLONES void add_blocks(const std::vector<PrimeBlocks>& primes, const float* blocks,
                           Channels<const float> x_DC, Channels<float> y_FC) {
  for (const PrimeBlocks& own : primes)
    for (int64_t r = 0; r < own.prime; ++r)
      add_block({blocks + own.residue(r), own.output_step(), own.input_step()}, of_residue(x_DC, own.prime, r),
                of_residue(y_FC, own.prime, r), own.outputs, own.inputs);
}

SRA_CLONES void add_outer_products(const PrimeBlocks& prime, int64_t residue, int64_t tokens,
                                   Channels<const float> y_FC, Channels<const float> x_DC, float* blocks) {
  const Channels<const float> y = of_residue(y_FC, prime.prime, residue),
                              x = of_residue(x_DC, prime.prime, residue);
  const int64_t row = prime.output_step(), column = prime.input_step();
  float* w = blocks + prime.residue(residue);
  int64_t i = 0;
  for (; i + 6 <= prime.outputs; i += 6)
    add_strip<6>({y.at + i * y.apart, y.apart}, x, tokens, w + i * row, row, column, prime.inputs);
  for (; i < prime.outputs; ++i)
    add_strip<1>({y.at + i * y.apart, y.apart}, x, tokens, w + i * row, row, column, prime.inputs);
}

void channels_first(const float* x_CD, int64_t count, int64_t width, Channels<float> out_DC) {
  for (int64_t d = 0; d < width; ++d) {
    float* channel = out_DC.at + d * out_DC.apart;
    std::fill(channel + count, channel + kVectorTokens, 0.0f);
  }
  for (int64_t d0 = 0; d0 < width; d0 += kTile)
    for (int64_t c0 = 0; c0 < count; c0 += kTile)
      for (int64_t d = d0; d < std::min(d0 + kTile, width); ++d)
        for (int64_t c = c0; c < std::min(c0 + kTile, count); ++c)
          out_DC.at[d * out_DC.apart + c] = x_CD[c * width + d];
}

void tokens_first(Channels<const float> x_DC, int64_t count, int64_t width, float* out_CD) {
  for (int64_t d0 = 0; d0 < width; d0 += kTile)
    for (int64_t c0 = 0; c0 < count; c0 += kTile)
      for (int64_t c = c0; c < std::min(c0 + kTile, count); ++c)
        for (int64_t d = d0; d < std::min(d0 + kTile, width); ++d)
          out_CD[c * width + d] = x_DC.at[d * x_DC.apart + c];
}

}  // namespace sra::cpu
