// What one token's row of scores needs, on the host and on the device alike: the order of experts, gates,
// and the gradient of gates. No torch and no CUDA runtime.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SRA_HD __host__ __device__ __forceinline__
#else
#define SRA_HD inline
#endif

namespace sra {

constexpr int kMaxExperts = 4096;
constexpr int kMaxTopK = 32;
constexpr float kGateEps = 1e-6f;  // as in ops/top_k_routing.py
constexpr int kNoExpert = 0x7fffffff;

// Forms of a gate; the names are those of RouterConfig.gate.
enum Gate : int { kSelected = 0, kAll = 1, kStraightThrough = 2 };

// A selection score as it competes: NaN and -inf are as low as the lowest number.
SRA_HD float competing(float score) { return score > -FLT_MAX ? score : -FLT_MAX; }

// Whether expert i with score v comes before expert j with score w: the higher score, then the lower id.
SRA_HD bool comes_before(float v, int i, float w, int j) { return v > w || (v == w && i < j); }

// Gates of the k chosen experts from their scores and the row's log-sum-exp. With a selection bias the
// first of them need not have the largest score.
SRA_HD void gates_of(Gate gate, const float* score, float lse, int k, float* gates) {
  if (k == 1) {
    gates[0] = gate == kAll ? expf(score[0] - lse) : 1.0f + 0.0f * score[0];
    return;
  }
  float shift = lse;
  if (gate != kAll) {
    shift = score[0];
    for (int j = 1; j < k; ++j) shift = score[j] > shift ? score[j] : shift;
  }
  float total = gate == kAll ? kGateEps : 0.0f;
  for (int j = 0; j < k; ++j) {
    gates[j] = expf(score[j] - shift);
    total += gates[j];
  }
  for (int j = 0; j < k; ++j) gates[j] /= total;
}

// The gradient of sum_j upstream_j gate_j to the scores: chosen[j] at expert j, and -p_e * the returned
// number at every expert e with probability p_e. With g the gates and u the upstream gradient,
//   softmax over the chosen    g_j (u_j - g.u),  0
//   p_j / (S + eps)            the same,         g.u eps / (S + eps)
//   p alone (k = 1)            p u,              p u
SRA_HD float gate_gradient(Gate gate, const float* score, float lse, int k, const float* upstream,
                           float* chosen) {
  if (k == 1) {
    if (gate == kSelected) return chosen[0] = 0.0f;
    return chosen[0] = expf(score[0] - lse) * upstream[0];
  }
  gates_of(gate, score, lse, k, chosen);
  float along = 0.0f, total = 0.0f;
  for (int j = 0; j < k; ++j) along += chosen[j] * upstream[j];
  for (int j = 0; j < k; ++j) chosen[j] *= upstream[j] - along;
  if (gate != kAll) return 0.0f;
  for (int j = 0; j < k; ++j) total += expf(score[j] - lse);
  return along * kGateEps / (total + kGateEps);
}

}  // namespace sra
