#include "experts.h"

#include <cmath>

#include "numbers.h"

namespace sra::cpu {
namespace {

constexpr float kRootTwoOverPi = 0.7978845608028654f, kCubic = 0.044715f;

SRA_INLINE float sigmoid(float x) {
  const float e = exp_negative(x < 0 ? x : -x);
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

// gelu(x) = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3), the tanh form.
SRA_INLINE float gelu_gate(float x) { return sigmoid(2.0f * kRootTwoOverPi * (x + kCubic * x * x * x)); }

SRA_INLINE float gelu_slope(float x, float gate) {
  return gate + x * gate * (1.0f - gate) * 2.0f * kRootTwoOverPi * (1.0f + 3.0f * kCubic * x * x);
}

template <class T>
SRA_INLINE void activate_of(const Hidden& hidden, const T* bias, int64_t n, T* active) {
  const int64_t F = hidden.width;
  for (int64_t r = 0; r < n; ++r) {
    T* up = static_cast<T*>(hidden.up) + r * F;
    T* out = active + r * F;
    if (hidden.gate != nullptr) {
      const T* gate = static_cast<const T*>(hidden.gate) + r * F;
#pragma omp simd
      for (int64_t f = 0; f < F; ++f) {
        const float x = gate[f];
        out[f] = T::nearest(x * sigmoid(x) * static_cast<float>(up[f]));
      }
      continue;
    }
    if (bias != nullptr) {
#pragma omp simd
      for (int64_t f = 0; f < F; ++f)
        up[f] = T::nearest(static_cast<float>(up[f]) + static_cast<float>(bias[f]));
    }
#pragma omp simd
    for (int64_t f = 0; f < F; ++f) {
      const float x = up[f];
      out[f] = T::nearest(x * gelu_gate(x));
    }
  }
}

template <class T>
SRA_INLINE void activate_backward_of(const Hidden& hidden, const T* grad_active, int64_t n, T* active,
                                     const Hidden& grad) {
  const int64_t F = hidden.width;
  for (int64_t r = 0; r < n; ++r) {
    const T* up = static_cast<const T*>(hidden.up) + r * F;
    const T* upstream = grad_active + r * F;
    T* out = active + r * F;
    T* grad_up = static_cast<T*>(grad.up) + r * F;
    if (hidden.gate != nullptr) {
      const T* gate = static_cast<const T*>(hidden.gate) + r * F;
      T* grad_gate = static_cast<T*>(grad.gate) + r * F;
#pragma omp simd
      for (int64_t f = 0; f < F; ++f) {
        const float x = gate[f], y = up[f], g = upstream[f], s = sigmoid(x);
        out[f] = T::nearest(x * s * y);
        grad_gate[f] = T::nearest(g * y * s * (1.0f + x * (1.0f - s)));
        grad_up[f] = T::nearest(g * x * s);
      }
      continue;
    }
#pragma omp simd
    for (int64_t f = 0; f < F; ++f) {
      const float x = up[f], g = upstream[f], gate = gelu_gate(x);
      out[f] = T::nearest(x * gate);
      grad_up[f] = T::nearest(g * gelu_slope(x, gate));
    }
  }
}

template <class T>
SRA_INLINE void add_bias_of(const T* bias, int64_t n, int64_t width, T* rows) {
  for (int64_t r = 0; r < n; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      T& number = rows[r * width + c];
      number = T::nearest(static_cast<float>(number) + static_cast<float>(bias[c]));
    }
  }
}

template <class T>
SRA_INLINE void sum_columns_of(const T* rows, int64_t n, int64_t width, T* sums) {
  constexpr int64_t kColumns = 256;
  for (int64_t start = 0; start < width; start += kColumns) {
    const int64_t count = width - start < kColumns ? width - start : kColumns;
    float sum[kColumns] = {};
    for (int64_t r = 0; r < n; ++r) {
      const T* row = rows + r * width + start;
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) sum[c] += static_cast<float>(row[c]);
    }
    for (int64_t c = 0; c < count; ++c) sums[start + c] = T::nearest(sum[c]);
  }
}

}  // namespace

SRA_CLONES void activate(Number type, const Hidden& hidden, const void* bias, int64_t n, void* active) {
  SRA_WITH_TYPE(type, activate_of(hidden, static_cast<const T*>(bias), n, static_cast<T*>(active)))
}

SRA_CLONES void activate_backward(Number type, const Hidden& hidden, const void* grad_active, int64_t n,
                                  void* active, const Hidden& grad) {
  SRA_WITH_TYPE(type, activate_backward_of(hidden, static_cast<const T*>(grad_active), n,
                                           static_cast<T*>(active), grad))
}

SRA_CLONES void add_bias(Number type, const void* bias, int64_t n, int64_t width, void* rows) {
  SRA_WITH_TYPE(type, add_bias_of(static_cast<const T*>(bias), n, width, static_cast<T*>(rows)))
}

SRA_CLONES void add_rows(Number type, const void* rows, int64_t n, void* sum) {
  SRA_WITH_TYPE(type, add_bias_of(static_cast<const T*>(rows), 1, n, static_cast<T*>(sum)))
}

SRA_CLONES void sum_columns(Number type, const void* rows, int64_t n, int64_t width, void* sums) {
  SRA_WITH_TYPE(type, sum_columns_of(static_cast<const T*>(rows), n, width, static_cast<T*>(sums)))
}

}  // namespace sra::cpu
