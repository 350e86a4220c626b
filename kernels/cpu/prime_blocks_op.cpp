// Products with a matrix of dense blocks on the CPU: chunks of tokens in parallel, each turned channels first,
// where rows of one residue lie a whole number of rows apart.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "../stable.h"
#include "prime_blocks.h"

namespace sra::cpu {
namespace {

namespace stable = torch::stable;

constexpr int64_t kForwardTokens = kVectorTokens, kBackwardTokens = 4 * kVectorTokens;

// The matrix: its sizes, its blocks, and how many rows beyond them residues may touch.
struct Matrix {
  int64_t outputs, inputs, padding = 0;
  std::vector<PrimeBlocks> primes;

  Matrix(int64_t outputs_, int64_t inputs_, const std::vector<int64_t>& numbers, bool inputs_first,
         const Tensor& blocks)
      : outputs(outputs_), inputs(inputs_) {
    int64_t begin = 0;
    for (int64_t p : numbers) {
      STD_TORCH_CHECK(p > 0, "prime_blocks: primes expected, got ", p);
      primes.push_back({p, (outputs + p - 1) / p, (inputs + p - 1) / p, begin, inputs_first});
      begin += p * primes.back().outputs * primes.back().inputs;
      padding = std::max(padding, p - 1);
    }
    STD_TORCH_CHECK(readable(blocks, ScalarType::Float, {begin}, blocks), "prime_blocks: ", begin,
                    " float32 numbers in blocks expected, got ", shape(blocks));
  }
};

void check_rows(const Tensor& rows, int64_t width) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous() && rows.scalar_type() == ScalarType::Float &&
                      (width < 0 || rows.size(1) == width),
                  "prime_blocks: contiguous float32 rows expected, got ", shape(rows));
}

// body(thread, first token, count) for every chunk, by as many threads as there are.
template <class Body>
void each_chunk(int64_t tokens, int64_t together, int64_t threads, const Body& body) {
  std::atomic<int64_t> next{0};
  stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t first = together * next++; first < tokens; first = together * next++)
        body(thread, first, std::min(together, tokens - first));
  });
}

int64_t threads_for(int64_t tokens, int64_t together) {
  return std::max<int64_t>(1, std::min<int64_t>(stable::get_num_threads(), (tokens + together - 1) / together));
}

using Buffer = std::vector<float>;

Tensor prime_blocks(const Tensor& x, const Tensor& blocks, std::vector<int64_t> primes, int64_t rows,
                    bool inputs_first) {
  check_rows(x, -1);
  const int64_t T = x.size(0), D = x.size(1), C = kForwardTokens;
  const Matrix matrix(rows, D, primes, inputs_first, blocks);
  Tensor y = empty(x, {T, rows});
  const int64_t threads = threads_for(T, C);
  std::vector<Buffer> inputs(threads, Buffer((D + matrix.padding) * C)),
      outputs(threads, Buffer((rows + matrix.padding) * C));
  each_chunk(T, C, threads, [&](int64_t thread, int64_t first, int64_t count) {
    Buffer &x_DC = inputs[thread], &y_FC = outputs[thread];
    channels_first(data<const float>(x) + first * D, count, D, C, x_DC.data());
    std::fill(y_FC.begin(), y_FC.end(), 0.0f);
    add_blocks(matrix.primes, data<const float>(blocks), C, x_DC.data(), y_FC.data());
    tokens_first(y_FC.data(), count, rows, C, data<float>(y) + first * rows);
  });
  return y;
}

std::tuple<Tensor, Tensor> prime_blocks_backward(const Tensor& grad, const Tensor& x, const Tensor& blocks,
                                                 std::vector<int64_t> primes, bool inputs_first) {
  check_rows(x, -1);
  check_rows(grad, -1);
  const int64_t T = x.size(0), D = x.size(1), F = grad.size(1), C = kBackwardTokens, B = blocks.numel();
  const Matrix matrix(F, D, primes, inputs_first, blocks);
  STD_TORCH_CHECK(grad.size(0) == T, "prime_blocks: a gradient for each of ", T, " tokens expected");
  Tensor grad_x = empty(x, {T, D}), grad_blocks = zeros(blocks, {B});
  const int64_t threads = threads_for(T, C);
  std::vector<Buffer> inputs(threads, Buffer((D + matrix.padding) * C)), grads_in = inputs,
      upstream(threads, Buffer((F + matrix.padding) * C)), sums(threads, Buffer(B));
  each_chunk(T, C, threads, [&](int64_t thread, int64_t first, int64_t count) {
    Buffer &x_DC = inputs[thread], &grad_DC = grads_in[thread], &grad_FC = upstream[thread];
    channels_first(data<const float>(x) + first * D, count, D, C, x_DC.data());
    channels_first(data<const float>(grad) + first * F, count, F, C, grad_FC.data());
    std::fill(grad_DC.begin(), grad_DC.end(), 0.0f);
    add_blocks_backward(matrix.primes, data<const float>(blocks), C, x_DC.data(), grad_FC.data(), grad_DC.data(),
                        sums[thread].data());
    tokens_first(grad_DC.data(), count, D, C, data<float>(grad_x) + first * D);
  });
  for (const Buffer& own : sums)
    for (int64_t b = 0; b < B; ++b) data<float>(grad_blocks)[b] += own[b];
  return {grad_x, grad_blocks};
}

}  // namespace
}  // namespace sra::cpu

STABLE_TORCH_LIBRARY_IMPL(sra_kernels, CPU, m) {
  m.impl("prime_blocks", TORCH_BOX(&sra::cpu::prime_blocks));
  m.impl("prime_blocks_backward", TORCH_BOX(&sra::cpu::prime_blocks_backward));
}
