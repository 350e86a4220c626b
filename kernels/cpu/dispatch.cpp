#include "dispatch.h"

#include <algorithm>
#include <cstring>

#include "numbers.h"

namespace sra::cpu {
namespace {

constexpr int64_t kTogether = 256;  // numbers of a row that are summed up in registers and the nearest cache

template <class T>
SRA_INLINE void spread(const Routes& routes, const T* x_TD, int64_t first, int64_t last, T* rows_RD) {
  for (int64_t t = first; t < last; ++t)
    for (int64_t k = 0; k < routes.per_token; ++k)
      std::memcpy(rows_RD + routes.place_TK[t * routes.per_token + k] * routes.width, x_TD + t * routes.width,
                  routes.width * sizeof(T));
}

template <class T>
SRA_INLINE void sum(const Routes& routes, const T* rows_RD, const float* gates_TK, int64_t first, int64_t last,
                    T* out_TD) {
  const int64_t K = routes.per_token, D = routes.width;
  alignas(64) float total[kTogether];
  for (int64_t t = first; t < last; ++t) {
    for (int64_t start = 0; start < D; start += kTogether) {
      const int64_t count = std::min(kTogether, D - start);
      std::fill(total, total + count, 0.0f);
      for (int64_t k = 0; k < K; ++k) {
        const T* row = rows_RD + routes.place_TK[t * K + k] * D + start;
        const float gate = gates_TK == nullptr ? 1.0f : gates_TK[t * K + k];
#pragma omp simd
        for (int64_t d = 0; d < count; ++d) total[d] += gate * static_cast<float>(row[d]);
      }
      T* out = out_TD + t * D + start;
#pragma omp simd
      for (int64_t d = 0; d < count; ++d) out[d] = T::nearest(total[d]);
    }
  }
}

template <class T>
SRA_INLINE void sum_backward(const Routes& routes, const T* grad_TD, const T* rows_RD, const float* gates_TK,
                             int64_t first, int64_t last, T* grad_RD, float* grad_gates_TK) {
  const int64_t K = routes.per_token, D = routes.width;
  for (int64_t t = first; t < last; ++t) {
    const T* grad = grad_TD + t * D;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t place = routes.place_TK[t * K + k];
      const T* row = rows_RD + place * D;
      T* out = grad_RD + place * D;
      const float gate = gates_TK[t * K + k];
      float along = 0.0f;
#pragma omp simd reduction(+ : along)
      for (int64_t d = 0; d < D; ++d) {
        const float upstream = grad[d];
        along += upstream * static_cast<float>(row[d]);
        out[d] = T::nearest(gate * upstream);
      }
      grad_gates_TK[t * K + k] = along;
    }
  }
}

}  // namespace

SRA_CLONES void spread_rows(Number type, const Routes& routes, const void* x_TD, int64_t first, int64_t last,
                            void* rows_RD) {
  SRA_WITH_TYPE(type, spread(routes, static_cast<const T*>(x_TD), first, last, static_cast<T*>(rows_RD)))
}

SRA_CLONES void sum_rows(Number type, const Routes& routes, const void* rows_RD, const float* gates_TK,
                         int64_t first, int64_t last, void* out_TD) {
  SRA_WITH_TYPE(type, sum(routes, static_cast<const T*>(rows_RD), gates_TK, first, last, static_cast<T*>(out_TD)))
}

SRA_CLONES void sum_rows_backward(Number type, const Routes& routes, const void* grad_TD, const void* rows_RD,
                                  const float* gates_TK, int64_t first, int64_t last, void* grad_RD,
                                  float* grad_gates_TK) {
  SRA_WITH_TYPE(type, sum_backward(routes, static_cast<const T*>(grad_TD), static_cast<const T*>(rows_RD), gates_TK,
                              first, last, static_cast<T*>(grad_RD), grad_gates_TK));
}

}  // namespace sra::cpu
