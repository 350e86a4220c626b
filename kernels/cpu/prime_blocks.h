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
  PrimeBlocks transposed() const { return {prime, inputs, outputs, begin, !inputs_first}; }  // the same numbers
};

constexpr int64_t kVectorTokens = 64;  // of one pass through a block

// Channels first: channel d begins at at[d * apart].
template <class Number>
struct Channels {
  Number* at;
  int64_t apart;

  operator Channels<const Number>() const { return {at, apart}; }
};

// y += W x for kVectorTokens tokens.
void add_blocks(const std::vector<PrimeBlocks>& primes, const float* blocks, Channels<const float> x_DC,
                Channels<float> y_FC);

// blocks += y x^T at the entries of one residue, over `tokens` tokens, a multiple of kVectorTokens.
void add_outer_products(const PrimeBlocks& prime, int64_t residue, int64_t tokens, Channels<const float> y_FC,
                        Channels<const float> x_DC, float* blocks);

// x[c][d] of `count` tokens to out[d][c] with zeros up to kVectorTokens; and back.
void channels_first(const float* x_CD, int64_t count, int64_t width, Channels<float> out_DC);
void tokens_first(Channels<const float> x_DC, int64_t count, int64_t width, float* out_CD);

}  // namespace sra::cpu
