// One row of the routing operator on a group of lanes: from scores to a routing, and from dot products to
// their gradient. The kernels that find dot products themselves and those that read them share it. `Row` is a
// kind of `Lanes`; all lanes of the warp run these functions together, `live` says which rows are there.
#pragma once

#include "cosine_route.h"
#include "warp.h"

namespace sra::cuda {

// A row's chosen experts, in shared memory.
struct Chosen {
  float score[kMaxTopK], number[kMaxTopK];
  int id[kMaxTopK];
};

__device__ __forceinline__ bool is_valid(const bool* valid_T, int64_t t) { return valid_T == nullptr || valid_T[t]; }

// Row t of scores `v` becomes row t of probabilities, or zeros if the token does not count; gates, ids,
// log-sum-exp and counts of routes are written. Returns whether this lane speaks for a token that counts.
template <class Row>
__device__ __forceinline__ bool route_row(float (&v)[Row::N], int lane, int64_t t, bool live, const Forward& in,
                                          Chosen& chosen, int* routes_E) {
  const int E = in.sizes.experts, K = in.sizes.top_k;
  float most = -INFINITY;
#pragma unroll
  for (int j = 0; j < Row::N; ++j) most = fmaxf(most, v[j]);
  most = max_over<Row::L>(most);

  Candidate last = before_all();
#pragma unroll 1
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int j = 0; j < Row::N; ++j) computed_anew(v[j]);
    if (in.bias_E == nullptr && in.noise_TE == nullptr) {
      last = best_after<Row>(v, lane, E, last, [&](int j, int) { return competing(v[j]); });
    } else {
      last = best_after<Row>(v, lane, E, last, [&](int j, int e) {
        if (e >= E) return -INFINITY;
        float value = v[j] + (in.bias_E ? in.bias_E[e] : 0.0f) + (in.noise_TE ? in.noise_TE[t * E + e] : 0.0f);
        computed_anew(value);  // one after the other
        return competing(value);
      });
    }
    last = best_over<Row::L>(last);
    if (lane == 0) chosen.score[k] = last.score, chosen.id[k] = last.id;
  }

  float total = 0.0f;
#pragma unroll
  for (int j = 0; j < Row::N; ++j) {
    v[j] = __expf(v[j] - most);
    total += Row::column(lane, j) < E ? v[j] : 0.0f;
  }
  total = sum_over<Row::L>(total);
  const float lse = most + logf(total);
  if (lane == 0) gates_of(in.sizes.gate, chosen.score, lse, K, chosen.number);
  __syncwarp();
  const bool counted = live && is_valid(in.valid_T, t);
  if (live) {
    if (lane == 0) in.lse_T[t] = lse;
    for (int k = lane; k < K; k += Row::L) {
      in.gates_TK[t * K + k] = chosen.number[k];
      in.ids_TK[t * K + k] = chosen.id[k];
      if (counted) atomicAdd(routes_E + chosen.id[k], 1);
    }
  }
  const float share = 1.0f / total;
#pragma unroll
  for (int j = 0; j < Row::N; ++j) v[j] = counted ? v[j] * share : 0.0f;
  __syncwarp();  // before `chosen` is written again
  return counted && lane == 0;
}

// What a row's gradient needs of the experts, in shared memory: 1 / |anchor|, |temperature| and the gradient
// of the mean probability over the number of valid tokens.
struct Columns {
  const float *inverse_a_E, *scale_E, *grad_probs_E;
};

// Row t of dot products `v` becomes row t of their gradient; (gradient of the score x cosine) is added to the
// lane's `cosines`. Returns the gradient along x, over |x|^2.
template <class Row>
__device__ __forceinline__ float route_row_backward(float (&v)[Row::N], float inverse_x, int lane, int64_t t,
                                                    bool live, const Backward& in, const Columns& columns,
                                                    Chosen& chosen, float (&cosines)[Row::N]) {
  const int E = in.sizes.experts, K = in.sizes.top_k;
  const float lse = in.lse_T[t], valid = is_valid(in.valid_T, t) ? 1.0f : 0.0f;
  for (int k = lane; k < K; k += Row::L) chosen.id[k] = static_cast<int>(in.ids_TK[t * K + k]);
  __syncwarp();
  float along_probs = 0.0f;
#pragma unroll
  for (int j = 0; j < Row::N; ++j) {
    const int e = Row::column(lane, j);
    if (e >= E) continue;
    v[j] *= inverse_x * columns.inverse_a_E[e];
    const float score = v[j] * columns.scale_E[e];
    along_probs += __expf(score - lse) * columns.grad_probs_E[e];
#pragma unroll 1
    for (int k = 0; k < K; ++k)
      if (chosen.id[k] == e) chosen.score[k] = score;
  }
  along_probs = sum_over<Row::L>(along_probs);
  __syncwarp();
  float spread = 0.0f;
  if (lane == 0)
    spread = gate_gradient(in.sizes.gate, chosen.score, lse, K, in.grad_gates_TK + t * K, chosen.number);
  spread = sum_over<Row::L>(spread);
  __syncwarp();
  const float everywhere = in.grad_lse_T[t] - valid * along_probs - spread;
  float along_x = 0.0f;
#pragma unroll
  for (int j = 0; j < Row::N; ++j) {
    const int e = Row::column(lane, j);
    if (e >= E) {
      v[j] = 0.0f;
      continue;
    }
    const float scale = columns.scale_E[e];
    float gradient = __expf(v[j] * scale - lse) * (valid * columns.grad_probs_E[e] + everywhere);
#pragma unroll 1
    for (int k = 0; k < K; ++k) gradient += chosen.id[k] == e ? chosen.number[k] : 0.0f;
    const float with_cosine = gradient * v[j];
    along_x += with_cosine * scale;
    cosines[j] += live ? with_cosine : 0.0f;
    v[j] = gradient * inverse_x * (columns.inverse_a_E[e] * scale);
  }
  along_x = sum_over<Row::L>(along_x);
  __syncwarp();  // before `chosen` is written again
  return inverse_x < in.scaling.largest_inverse ? along_x * inverse_x * inverse_x : 0.0f;
}

}  // namespace sra::cuda
