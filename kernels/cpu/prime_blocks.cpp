#include "prime_blocks.h"

#include <algorithm>
#include <cstring>

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

// M rows of y, `apart` floats from each other: y[m] += sum_k w(m, k) x[k], kVectorTokens tokens.
template <int M>
SRA_INLINE void add_rows_of(const Weights& w, const float* x, int64_t apart, float* y, int64_t inputs) {
  Vector sum[M][kVectors];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kVectors; ++v) sum[m][v] = load(y + m * apart + v * kLanes);
  for (int64_t k = 0; k < inputs; ++k) {
    Vector own[kVectors];
    for (int v = 0; v < kVectors; ++v) own[v] = load(x + k * apart + v * kLanes);
    for (int m = 0; m < M; ++m) {
      const float weight = w.at[m * w.row + k * w.column];
      for (int v = 0; v < kVectors; ++v) sum[m][v] += weight * own[v];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kVectors; ++v) store(y + m * apart + v * kLanes, sum[m][v]);
}

// y[i] += sum_k w(i, k) x[k] for all outputs of a residue.
SRA_INLINE void add_block(const Weights& w, const float* x, int64_t apart, float* y, int64_t outputs,
                          int64_t inputs) {
  int64_t i = 0;
  const auto rest = [&] { return Weights{w.at + i * w.row, w.row, w.column}; };
  for (; i + 6 <= outputs; i += 6) add_rows_of<6>(rest(), x, apart, y + i * apart, inputs);
  for (; i + 2 <= outputs; i += 2) add_rows_of<2>(rest(), x, apart, y + i * apart, inputs);
  for (; i < outputs; ++i) add_rows_of<1>(rest(), x, apart, y + i * apart, inputs);
}

// w(m, n) += g[m] . x[n] over the tokens.
template <int M, int N>
SRA_INLINE void add_dots(const float* g, const float* x, int64_t apart, int64_t tokens, float* w, int64_t row,
                         int64_t column) {
  Vector sum[M][N] = {};
  for (int64_t t = 0; t < tokens; t += kLanes) {
    Vector own[N];
    for (int n = 0; n < N; ++n) own[n] = load(x + n * apart + t);
    for (int m = 0; m < M; ++m) {
      const Vector upstream = load(g + m * apart + t);
      for (int n = 0; n < N; ++n) sum[m][n] += upstream * own[n];
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
SRA_INLINE void add_strip(const float* g, const float* x, int64_t apart, int64_t tokens, float* w, int64_t row,
                          int64_t column, int64_t inputs) {
  int64_t j = 0;
  for (; j + 4 <= inputs; j += 4)
    add_dots<M, 4>(g, x + j * apart, apart, tokens, w + j * column, row, column);
  for (; j < inputs; ++j) add_dots<M, 1>(g, x + j * apart, apart, tokens, w + j * column, row, column);
}

}  // namespace

SRA_CLONES void add_blocks(const std::vector<PrimeBlocks>& primes, const float* blocks, int64_t tokens,
                           const float* x_DC, float* y_FC) {
  for (const PrimeBlocks& own : primes)
    for (int64_t r = 0; r < own.prime; ++r)
      for (int64_t c = 0; c < tokens; c += kVectorTokens)
        add_block({blocks + own.residue(r), own.output_step(), own.input_step()}, x_DC + r * tokens + c,
                  own.prime * tokens, y_FC + r * tokens + c, own.outputs, own.inputs);
}

SRA_CLONES void add_blocks_backward(const std::vector<PrimeBlocks>& primes, const float* blocks, int64_t tokens,
                                    const float* x_DC, const float* grad_FC, float* grad_DC,
                                    float* grad_blocks) {
  for (const PrimeBlocks& own : primes) {
    const int64_t apart = own.prime * tokens, row = own.output_step(), column = own.input_step();
    for (int64_t r = 0; r < own.prime; ++r) {
      const float *x = x_DC + r * tokens, *grad = grad_FC + r * tokens;
      for (int64_t c = 0; c < tokens; c += kVectorTokens)
        add_block({blocks + own.residue(r), column, row}, grad + c, apart, grad_DC + r * tokens + c, own.inputs,
                  own.outputs);
      float* w = grad_blocks + own.residue(r);
      int64_t i = 0;
      for (; i + 6 <= own.outputs; i += 6)
        add_strip<6>(grad + i * apart, x, apart, tokens, w + i * row, row, column, own.inputs);
      for (; i < own.outputs; ++i)
        add_strip<1>(grad + i * apart, x, apart, tokens, w + i * row, row, column, own.inputs);
    }
  }
}

void channels_first(const float* x_CD, int64_t count, int64_t width, int64_t tokens, float* out_DC) {
  for (int64_t d = 0; d < width; ++d) std::fill(out_DC + d * tokens + count, out_DC + (d + 1) * tokens, 0.0f);
  for (int64_t d0 = 0; d0 < width; d0 += kTile)
    for (int64_t c0 = 0; c0 < count; c0 += kTile)
      for (int64_t d = d0; d < std::min(d0 + kTile, width); ++d)
        for (int64_t c = c0; c < std::min(c0 + kTile, count); ++c) out_DC[d * tokens + c] = x_CD[c * width + d];
}

void tokens_first(const float* x_DC, int64_t count, int64_t width, int64_t tokens, float* out_CD) {
  for (int64_t d0 = 0; d0 < width; d0 += kTile)
    for (int64_t c0 = 0; c0 < count; c0 += kTile)
      for (int64_t c = c0; c < std::min(c0 + kTile, count); ++c)
        for (int64_t d = d0; d < std::min(d0 + kTile, width); ++d) out_CD[c * width + d] = x_DC[d * tokens + c];
}

}  // namespace sra::cpu
