// A row of scores spread over the lanes of a GPU's warp, and the search of its best experts; compiled for
// the host too, where lanes are an array.
#pragma once

#include "row_core.h"

namespace sra {

// L lanes hold N numbers each, V neighbours at a time.
template <int L_, int N_, int V_>
struct Lanes {
  static constexpr int L = L_, N = N_, V = V_, kColumns = L * N;
  static SRA_HD int column(int lane, int j) { return j / V * V * L + lane * V + j % V; }
};

// Somebody in the competition: expert `id` competes with `value`; its clean score is `score`.
struct Candidate {
  float value;
  int id;
  float score;
};

SRA_HD Candidate before_all() { return {INFINITY, -1, 0.0f}; }

SRA_HD Candidate better_of(Candidate a, Candidate b) {
  return comes_before(b.value, b.id, a.value, a.id) ? b : a;
}

// The best of a lane's numbers that comes after `last`; compete(j, e) is what number j, of expert e,
// competes with. Numbers are not moved and indices known when compiling, so they stay in registers.
template <class Row, class Compete>
SRA_HD Candidate best_after(const float (&score)[Row::N], int lane, int experts, Candidate last,
                            const Compete& compete) {
  Candidate best{-INFINITY, kNoExpert, 0.0f};
#pragma unroll
  for (int j = 0; j < Row::N; ++j) {
    const int e = Row::column(lane, j);
    const float value = compete(j, e);
    const bool better = e < experts && comes_before(last.value, last.id, value, e) &&
                        comes_before(value, e, best.value, best.id);
    best.value = better ? value : best.value;
    best.id = better ? e : best.id;
    best.score = better ? score[j] : best.score;
  }
  return best;
}

}  // namespace sra
