// Products with a matrix of dense blocks on the CPU, channels first: `tokens` numbers of a channel lie
// together, and a vector holds some of them. For prime p, outputs i of residue r (r, r + p, ..) meet inputs
// j of residue r; padding makes every residue as long as the longest.
#pragma once

#include <cstdint>
#include <vector>

namespace sra::cpu {

// The blocks of one prime within the flat vector of all: entry (r, i, j) lies at
// begin + (r * outputs + i) * inputs + j, or with `inputs_first` at begin + (r * inputs + j) * outputs + i.
struct PrimeBlocks {
  int64_t prime, outputs, inputs, begin;
  bool inputs_first;

  int64_t output_step() const { return inputs_first ? 1 : inputs; }
  int64_t input_step() const { return inputs_first ? outputs : 1; }
  int64_t residue(int64_t r) const { return begin + r * outputs * inputs; }
};

constexpr int64_t kVectorTokens = 64;  // of one pass through a block

// y += W x for `tokens` tokens, a multiple of kVectorTokens; rows of x and y are `tokens` apart.
void add_blocks(const std::vector<PrimeBlocks>& primes, const float* blocks, int64_t tokens, const float* x_DC,
                float* y_FC);

// grad_x += W^T grad_y, and grad_blocks += grad_y x^T at the blocks' entries.
void add_blocks_backward(const std::vector<PrimeBlocks>& primes, const float* blocks, int64_t tokens,
                         const float* x_DC, const float* grad_FC, float* grad_DC, float* grad_blocks);

// x[c][d] of `count` tokens to out[d][c], rows `tokens` apart, zero beyond count; and back.
void channels_first(const float* x_CD, int64_t count, int64_t width, int64_t tokens, float* out_DC);
void tokens_first(const float* x_DC, int64_t count, int64_t width, int64_t tokens, float* out_CD);

}  // namespace sra::cpu
