// Products with a matrix of dense blocks on the CPU: chunks of tokens in parallel, each turned channels first,
// where rows of one residue lie a whole number of rows apart.
#include <algorithm>
#include <atomic>
#include <tuple>
#include <utility>
#include <vector>

#include "../stable.h"
#include "prime_blocks.h"

namespace sra::cpu {
namespace {

namespace stable = torch::stable;

// Of the backward pass; rows one cache line further apart, or they would all fall on the same lines of a cache.
constexpr int64_t kChunkTokens = 512, kApart = kChunkTokens + 16;

// The matrix and its transpose by primes, all (prime, residue), and how many rows too many residues may touch.
struct Matrix {
  int64_t padding = 0;
  std::vector<PrimeBlocks> primes, transposed;
  std::vector<std::pair<size_t, int64_t>> residues;

  Matrix(int64_t outputs, int64_t inputs, const std::vector<int64_t>& numbers, bool inputs_first,
         const Tensor& blocks) {
    int64_t begin = 0;
    for (int64_t p : numbers) {
      STD_TORCH_CHECK(p > 0, "prime_blocks: primes expected, got ", p);
      primes.push_back({p, (outputs + p - 1) / p, (inputs + p - 1) / p, begin, inputs_first});
      transposed.push_back(primes.back().transposed());
      for (int64_t r = 0; r < p; ++r) residues.emplace_back(primes.size() - 1, r);
      begin += p * primes.back().outputs * primes.back().inputs;
      padding = std::max(padding, p - 1);
    }
    STD_TORCH_CHECK(readable(blocks, ScalarType::Float, {begin}, blocks), "prime_blocks: ", begin,
                    " float32 numbers in blocks expected, got ", shape(blocks));
  }
};

void check_rows(const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous() && rows.scalar_type() == ScalarType::Float,
                  "prime_blocks: contiguous float32 rows expected, got ", shape(rows));
}

// body(item, buffer) for every item, by as many threads as there are; each has a buffer of so many numbers.
template <class Body>
void each(int64_t items, size_t numbers, const Body& body) {
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(stable::get_num_threads(), items));
  std::atomic<int64_t> next{0};
  stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> own(numbers);
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t item = next++; item < items; item = next++) body(item, own.data());
  });
}

int64_t passes(int64_t tokens) { return (tokens + kVectorTokens - 1) / kVectorTokens; }

Tensor prime_blocks(const Tensor& x, const Tensor& blocks, std::vector<int64_t> primes, int64_t rows,
                    bool inputs_first) {
  check_rows(x);
  const int64_t T = x.size(0), D = x.size(1);
  const Matrix matrix(rows, D, primes, inputs_first, blocks);
  const int64_t of_x = (D + matrix.padding) * kVectorTokens, of_y = (rows + matrix.padding) * kVectorTokens;
  Tensor y = empty(x, {T, rows});
  each(passes(T), of_x + of_y, [&](int64_t pass, float* buffer) {
    const int64_t first = pass * kVectorTokens, count = std::min(kVectorTokens, T - first);
    const Channels<float> x_DC{buffer, kVectorTokens}, y_FC{buffer + of_x, kVectorTokens};
    channels_first(data<const float>(x) + first * D, count, D, x_DC);
    std::fill_n(y_FC.at, of_y, 0.0f);
    add_blocks(matrix.primes, data<const float>(blocks), x_DC, y_FC);
    tokens_first(y_FC, count, rows, data<float>(y) + first * rows);
  });
  return y;
}

// Chunk after chunk: passes in parallel turn their tokens channels first and form their gradient of x, then
// residues in parallel add to theirs of the blocks. So every sum has one order, whoever forms it.
std::tuple<Tensor, Tensor> prime_blocks_backward(const Tensor& grad, const Tensor& x, const Tensor& blocks,
                                                 std::vector<int64_t> primes, bool inputs_first) {
  check_rows(x);
  check_rows(grad);
  const int64_t T = x.size(0), D = x.size(1), F = grad.size(1);
  const Matrix matrix(F, D, primes, inputs_first, blocks);
  STD_TORCH_CHECK(grad.size(0) == T, "prime_blocks: a gradient for each of ", T, " tokens expected");
  Tensor grad_x = empty(x, {T, D}), grad_blocks = zeros(blocks, {blocks.numel()});
  std::vector<float> inputs((D + matrix.padding) * kApart), upstream((F + matrix.padding) * kApart);
  const int64_t of_x = (D + matrix.padding) * kVectorTokens;
  for (int64_t begin = 0; begin < T; begin += kChunkTokens) {
    const int64_t tokens = std::min(kChunkTokens, T - begin);
    each(passes(tokens), of_x, [&](int64_t pass, float* buffer) {
      const int64_t first = begin + pass * kVectorTokens, count = std::min(kVectorTokens, T - first);
      const Channels<float> x_DC{inputs.data() + pass * kVectorTokens, kApart},
          grad_FC{upstream.data() + pass * kVectorTokens, kApart}, grad_DC{buffer, kVectorTokens};
      channels_first(data<const float>(x) + first * D, count, D, x_DC);
      channels_first(data<const float>(grad) + first * F, count, F, grad_FC);
      std::fill_n(grad_DC.at, of_x, 0.0f);
      add_blocks(matrix.transposed, data<const float>(blocks), grad_FC, grad_DC);
      tokens_first(grad_DC, count, D, data<float>(grad_x) + first * D);
    });
    each(matrix.residues.size(), 0, [&](int64_t item, float*) {
      const auto [prime, residue] = matrix.residues[item];
      add_outer_products(matrix.primes[prime], residue, passes(tokens) * kVectorTokens,
                         {upstream.data(), kApart}, {inputs.data(), kApart}, data<float>(grad_blocks));
    });
  }
  return {grad_x, grad_blocks};
}

}  // namespace
}  // namespace sra::cpu

STABLE_TORCH_LIBRARY_IMPL(sra_kernels, CPU, m) {
  m.impl("prime_blocks", TORCH_BOX(&sra::cpu::prime_blocks));
  m.impl("prime_blocks_backward", TORCH_BOX(&sra::cpu::prime_blocks_backward));
}
