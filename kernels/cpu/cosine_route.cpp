#include "cosine_route.h"

#include <algorithm>

#include "numbers.h"

namespace sra::cpu {
namespace {

constexpr int kBlock = 16;

// The k best of a row, by `comes_before`: blocks without anything better than the k-th are skipped.
struct Best {
  float value[kMaxTopK];
  int id[kMaxTopK];

  SRA_INLINE void find(const float* selection, int experts, int k) {
    for (int j = 0; j < k; ++j) value[j] = -INFINITY, id[j] = kNoExpert;
    for (int start = 0; start < experts; start += kBlock) {
      const int count = std::min(kBlock, experts - start);
      const float worst = value[k - 1];
      int better = count < kBlock;
      if (count == kBlock) {
#pragma omp simd reduction(| : better)
        for (int j = 0; j < kBlock; ++j) better |= selection[start + j] > worst;
      }
      if (!better) continue;
      for (int j = 0; j < count; ++j) insert(selection[start + j], start + j, k);
    }
  }

  // Ids come in increasing order, so a tie stays behind.
  SRA_INLINE void insert(float v, int i, int k) {
    if (!(v > value[k - 1])) return;
    int place = k - 1;
    for (; place > 0 && v > value[place - 1]; --place) {
      value[place] = value[place - 1];
      id[place] = id[place - 1];
    }
    value[place] = v;
    id[place] = i;
  }
};

template <class T>
SRA_INLINE void inverse_norms_of(const T* rows, int64_t count, int64_t width, float eps, float* inverse,
                                 float* wide) {
  for (int64_t t = 0; t < count; ++t) {
    const T* row = rows + t * width;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; ++d) sum += static_cast<float>(row[d]) * static_cast<float>(row[d]);
    inverse[t] = 1.0f / std::max(std::sqrt(sum), eps);
    if (wide == nullptr) continue;
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) wide[t * width + d] = static_cast<float>(row[d]);
  }
}

template <class G, class T>
SRA_INLINE void subtract_along_of(const G* gradient, const T* rows, const float* along, int64_t count,
                                  int64_t width, T* out) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t start = t * width;
    const float factor = along[t];
#pragma omp simd
    for (int64_t d = 0; d < width; ++d)
      out[start + d] = T::nearest(static_cast<float>(gradient[start + d]) -
                                  factor * static_cast<float>(rows[start + d]));
  }
}

template <class T>
SRA_INLINE void round_row(const float* row, int64_t width, void* out) {
  T* numbers = static_cast<T*>(out);
#pragma omp simd
  for (int64_t e = 0; e < width; ++e) numbers[e] = T::nearest(row[e]);
}

}  // namespace

SRA_CLONES void inverse_norms(const void* rows, Number type, int64_t count, int64_t width, float eps,
                              float* inverse, float* wide) {
  SRA_WITH_TYPE(type, inverse_norms_of(static_cast<const T*>(rows), count, width, eps, inverse, wide))
}

SRA_CLONES void subtract_along(const void* gradient, Number gradient_type, const void* rows, Number type,
                               const float* along, int64_t count, int64_t width, void* out) {
  if (gradient_type == Number::kFloat) {
    SRA_WITH_TYPE(type, subtract_along_of(static_cast<const Float*>(gradient), static_cast<const T*>(rows), along,
                                          count, width, static_cast<T*>(out)))
  } else {
    SRA_WITH_TYPE(type, subtract_along_of(static_cast<const T*>(gradient), static_cast<const T*>(rows), along,
                                          count, width, static_cast<T*>(out)))
  }
}

SRA_CLONES void route_rows(const Scores& in, const Selection& selection, int64_t first, int64_t last,
                           float* gates_TK, int64_t* ids_TK, float* lse_T, float* load_E, float* probs_E) {
  const int E = in.experts, K = in.top_k;
  alignas(64) float score[kMaxExperts], power[kMaxExperts], competing_score[kMaxExperts], column[kMaxExperts];
#pragma omp simd
  for (int e = 0; e < E; ++e) column[e] = in.inverse_a_E[e] * in.scale_E[e];
  for (int64_t t = first; t < last; ++t) {
    const float* dots = in.dots_TE + t * E;
    const float inverse_x = in.inverse_x_T[t];
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int e = 0; e < E; ++e) {
      score[e] = dots[e] * inverse_x * column[e];
      most = score[e] > most ? score[e] : most;
    }
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int e = 0; e < E; ++e) {
      power[e] = exp_negative(score[e] - most);
      total += power[e];
    }
    const float lse = most + std::log(total);
    const bool valid = selection.valid_T == nullptr || selection.valid_T[t];
    if (valid) {
      const float share = 1.0f / total;
#pragma omp simd
      for (int e = 0; e < E; ++e) probs_E[e] += power[e] * share;
    }
    const float* bias = selection.bias_E;
    const float* noise = selection.noise_TE == nullptr ? nullptr : selection.noise_TE + t * E;
    for (int e = 0; e < E; ++e) {
      float v = score[e];
      if (bias != nullptr) v += bias[e];
      if (noise != nullptr) v += noise[e];
      competing_score[e] = competing(v);
    }
    Best best;
    best.find(competing_score, E, K);
    float chosen[kMaxTopK];
    for (int j = 0; j < K; ++j) {
      chosen[j] = score[best.id[j]];
      ids_TK[t * K + j] = best.id[j];
      if (valid) load_E[best.id[j]] += 1.0f;
    }
    gates_of(in.gate, chosen, lse, K, gates_TK + t * K);
    lse_T[t] = lse;
  }
}

SRA_CLONES void route_rows_backward(const Scores& in, const Upstream& upstream, const bool* valid_T,
                                    const int64_t* ids_TK, const float* lse_T, int64_t first, int64_t last,
                                    void* grad_TE, Number type, float* along_x_T, float* cosines_E) {
  const int E = in.experts, K = in.top_k;
  const float *inverse_a = in.inverse_a_E, *scale = in.scale_E, *grad_probs = upstream.probs_E;
  alignas(64) float cosine[kMaxExperts], power[kMaxExperts], column[kMaxExperts], narrow[kMaxExperts];
#pragma omp simd
  for (int e = 0; e < E; ++e) column[e] = inverse_a[e] * scale[e];
  for (int64_t t = first; t < last; ++t) {
    const float* dots = in.dots_TE + t * E;
    const int64_t* ids = ids_TK + t * K;
    const float inverse_x = in.inverse_x_T[t], lse = lse_T[t];
    const float valid = valid_T == nullptr || valid_T[t] ? 1.0f : 0.0f;
    float along_probs = 0.0f;
#pragma omp simd reduction(+ : along_probs)
    for (int e = 0; e < E; ++e) {
      cosine[e] = dots[e] * inverse_x * inverse_a[e];
      power[e] = exp_negative(cosine[e] * scale[e] - lse);
      along_probs += power[e] * grad_probs[e];
    }
    float score[kMaxTopK], chosen[kMaxTopK];
    for (int j = 0; j < K; ++j) score[j] = cosine[ids[j]] * scale[ids[j]];
    const float spread = gate_gradient(in.gate, score, lse, K, upstream.gates_TK + t * K, chosen);
    const float everywhere = upstream.lse_T[t] - valid * along_probs - spread;
    float* out = type == Number::kFloat ? static_cast<float*>(grad_TE) + t * E : narrow;
#pragma omp simd
    for (int e = 0; e < E; ++e) out[e] = power[e] * (valid * grad_probs[e] + everywhere);
    for (int j = 0; j < K; ++j) out[ids[j]] += chosen[j];
    float along_x = 0.0f;
#pragma omp simd reduction(+ : along_x)
    for (int e = 0; e < E; ++e) {
      const float with_cosine = out[e] * cosine[e];
      along_x += with_cosine * scale[e];
      cosines_E[e] += with_cosine;
      out[e] *= inverse_x * column[e];
    }
    if (type == Number::kBFloat16) round_row<BFloat16>(out, E, static_cast<BFloat16*>(grad_TE) + t * E);
    along_x_T[t] = inverse_x < in.largest_inverse ? along_x * inverse_x * inverse_x : 0.0f;
  }
}

}  // namespace sra::cpu
