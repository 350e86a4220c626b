// Reading and writing of 16-bit numbers, and exp, in plain arithmetic that compilers vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "../number.h"

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#error GCC 12 or later is needed, for _Float16 and for versions by the level of a processor
#endif

namespace sra::cpu {

#define SRA_INLINE inline __attribute__((always_inline))

// Versions for newer processors, chosen when the library is loaded.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define SRA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SRA_CLONES
#endif

SRA_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SRA_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
  SRA_INLINE operator float() const { return from_bits(static_cast<uint32_t>(bits) << 16); }
  static SRA_INLINE BFloat16 nearest(float value) {  // ties to even; NaN stays NaN
    const uint32_t u = to_bits(value);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(value == value ? rounded : 0x7fc0)};
  }
};

struct Half {
  _Float16 value;
  SRA_INLINE operator float() const { return static_cast<float>(value); }
  static SRA_INLINE Half nearest(float value) { return {static_cast<_Float16>(value)}; }
};

struct Float {
  float value;
  SRA_INLINE operator float() const { return value; }
  static SRA_INLINE Float nearest(float value) { return {value}; }
};

// A statement in which T is the type of the numbers. A macro, so that it is compiled with the caller, for
// each of its processors.
#define SRA_WITH_TYPE(type, ...)          \
  switch (type) {                         \
    case Number::kFloat: {                \
      using T = Float;                    \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
    case Number::kBFloat16: {             \
      using T = BFloat16;                 \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
    case Number::kHalf: {                 \
      using T = Half;                     \
      __VA_ARGS__;                        \
    }                                     \
  }

// exp of x <= 0 to about 2 ulp (degree-6 polynomial on [-ln 2 / 2, ln 2 / 2]); below -87 it is exp(-87).
SRA_INLINE float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // the nearest integer, in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * from_bits((to_bits(shifted) - 0x4B400000u + 127u) << 23);
}

}  // namespace sra::cpu
