// The row core against plain double arithmetic: order of experts, gates, and numeric gradients.
#include "row_core.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/cosine_route.h"
#include "lanes.h"

using namespace sra;

#define CHECK(condition)                                                        \
  if (!(condition)) {                                                           \
    std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);                 \
    std::exit(1);                                                               \
  }

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
std::mt19937 engine(0);

float normal() { return std::normal_distribution<float>()(engine); }

double lse_of(const std::vector<double>& scores) {
  const double most = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (double s : scores) sum += std::exp(s - most);
  return most + std::log(sum);
}

// Gates by their definitions (`RouterConfig.gate`) from all scores, in double.
std::vector<double> gates_by_definition(Gate gate, const std::vector<double>& scores, const std::vector<int>& ids) {
  std::vector<double> gates;
  double lse = lse_of(scores), sum = 0;
  for (int i : ids) gates.push_back(std::exp(scores[i] - lse));
  if (ids.size() == 1) return {gate == kSelected ? 1.0 : gates[0]};
  for (double g : gates) sum += g;
  for (double& g : gates) g /= sum + (gate == kAll ? 1e-6 : 0.0);
  return gates;
}

void test_order() {
  CHECK(competing(kNan) == competing(-kInf) && competing(-kInf) == -FLT_MAX);
  CHECK(competing(kInf) == kInf && competing(-1.5f) == -1.5f);
  CHECK(comes_before(2, 9, 1, 0) && !comes_before(1, 0, 2, 9));
  CHECK(comes_before(1, 0, 1, 9) && !comes_before(1, 9, 1, 0) && !comes_before(1, 3, 1, 3));
}

void test_gates_and_gradient(Gate gate, int experts, int k) {
  std::vector<double> scores(experts);
  for (double& s : scores) s = 3 * normal();
  std::vector<int> ids(experts);
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), engine);  // with a selection bias anyone may be chosen
  ids.resize(k);
  const float lse = static_cast<float>(lse_of(scores));
  std::vector<float> chosen, gates(k), upstream(k), at(k);
  for (int i : ids) chosen.push_back(static_cast<float>(scores[i]));
  for (float& u : upstream) u = normal();
  gates_of(gate, chosen.data(), lse, k, gates.data());
  const std::vector<double> expected = gates_by_definition(gate, scores, ids);
  for (int j = 0; j < k; ++j)
    CHECK(std::abs(gates[j] - (k == 1 && gate == kStraightThrough ? 1.0 : expected[j])) < 1e-6);

  const float spread = gate_gradient(gate, chosen.data(), lse, k, upstream.data(), at.data());
  for (int e = 0; e < experts; ++e) {
    double numeric = 0;
    const double step = 1e-5;
    for (int sign : {1, -1}) {
      std::vector<double> moved = scores;
      moved[e] += sign * step;
      const std::vector<double> there = gates_by_definition(gate, moved, ids);
      for (int j = 0; j < k; ++j) numeric += sign * upstream[j] * there[j] / (2 * step);
    }
    double analytic = -std::exp(scores[e] - lse) * spread;
    for (int j = 0; j < k; ++j) analytic += ids[j] == e ? at[j] : 0.0;
    CHECK(std::abs(numeric - analytic) < 2e-5);
  }
}

// One row through the vectorised kernel against a stable sort.
void test_row(int experts, int k, int kind) {
  std::vector<float> dots(experts), ones(experts, 1.0f), load(experts, 0.0f), probs(experts, 0.0f), gates(k);
  for (float& d : dots) d = kind == 0 ? normal() : std::round(2 * normal()) / 2;  // the latter has many ties
  if (kind == 2) std::fill(dots.begin(), dots.end(), 0.25f);
  std::vector<float> bias(experts, 0.0f);
  if (kind == 3)
    for (float& b : bias) b = std::vector<float>{kNan, -kInf, 0.0f, 1.0f}[engine() % 4];
  std::vector<int> order(experts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return competing(dots[a] + bias[a]) > competing(dots[b] + bias[b]);
  });
  const float one = 1.0f;
  std::vector<int64_t> ids(k);
  float lse;
  const cpu::Scores in{dots.data(), &one, ones.data(), ones.data(), 1e8f, experts, k, kAll};
  cpu::route_rows(in, {bias.data(), nullptr, nullptr}, 0, 1, gates.data(), ids.data(), &lse, load.data(),
                  probs.data());
  const std::vector<double> scores(dots.begin(), dots.end());
  CHECK(std::abs(lse - lse_of(scores)) < 1e-5 * (1 + std::abs(lse)));
  for (int j = 0; j < k; ++j) CHECK(ids[j] == order[j] && load[order[j]] == 1.0f);
  for (int e = 0; e < experts; ++e) CHECK(std::abs(probs[e] - std::exp(scores[e] - lse_of(scores))) < 1e-6);
}

// The search of the best over lanes as a warp does it, exchanging candidates between lanes i and i ^ o.
template <class Row>
void test_lanes(int experts, int k, int kind) {
  static_assert((Row::L & (Row::L - 1)) == 0 && Row::N % Row::V == 0);
  std::vector<float> scores(experts);
  for (float& s : scores) s = kind == 0 ? normal() : std::round(2 * normal()) / 2;
  if (kind == 2) std::fill(scores.begin(), scores.end(), 0.25f);
  if (kind == 3)
    for (float special : {kNan, -kInf, kInf, kNan}) scores[engine() % experts] = special;
  std::vector<int> order(experts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return competing(scores[a]) > competing(scores[b]);
  });
  float held[Row::L][Row::N];
  std::vector<int> holders(Row::kColumns, 0);
  for (int lane = 0; lane < Row::L; ++lane)
    for (int j = 0; j < Row::N; ++j) {
      const int e = Row::column(lane, j);
      ++holders[e];
      held[lane][j] = e < experts ? scores[e] : kNan;
    }
  CHECK(std::all_of(holders.begin(), holders.end(), [](int count) { return count == 1; }));
  Candidate last = before_all();
  for (int round = 0; round < k; ++round) {
    std::vector<Candidate> best;
    for (int lane = 0; lane < Row::L; ++lane)
      best.push_back(best_after<Row>(held[lane], lane, experts, last,
                                     [&](int j, int) { return competing(held[lane][j]); }));
    for (int o = Row::L / 2; o > 0; o /= 2) {
      const std::vector<Candidate> before = best;
      for (int lane = 0; lane < Row::L; ++lane) best[lane] = better_of(before[lane], before[lane ^ o]);
    }
    for (const Candidate& found : best) {
      CHECK(found.id == order[round] && found.value == competing(scores[order[round]]));
      CHECK(found.score == scores[order[round]] || std::isnan(scores[order[round]]));
    }
    last = best[0];
  }
}

template <class Row>
void test_lanes_of_every_width() {
  for (int experts : {1, 2, Row::kColumns / 2 + 1, Row::kColumns - 1, Row::kColumns})
    for (int k : {1, 2, 3, 8, 16})
      for (int repeat = 0; k <= experts && repeat < 40; ++repeat) test_lanes<Row>(experts, k, repeat % 4);
}

int main() {
  test_order();
  for (Gate gate : {kSelected, kAll, kStraightThrough})
    for (int experts : {1, 2, 5, 16, 33, 128})
      for (int k : {1, 2, 3, 8, 16})
        for (int repeat = 0; k <= experts && repeat < 20; ++repeat) test_gates_and_gradient(gate, experts, k);
  for (int experts : {1, 7, 15, 16, 17, 31, 64, 100, 1000, 4096})
    for (int k : {1, 2, 5, 16})
      for (int repeat = 0; k <= experts && repeat < 50; ++repeat) test_row(experts, k, repeat % 4);
  test_lanes_of_every_width<Lanes<4, 8, 4>>();  // rows in memory
  test_lanes_of_every_width<Lanes<8, 16, 4>>();
  test_lanes_of_every_width<Lanes<16, 16, 4>>();
  test_lanes_of_every_width<Lanes<32, 32, 4>>();
  test_lanes_of_every_width<Lanes<32, 128, 4>>();
  test_lanes_of_every_width<Lanes<4, 8, 2>>();  // rows of a matrix instruction
  test_lanes_of_every_width<Lanes<4, 32, 2>>();
  test_lanes_of_every_width<Lanes<4, 64, 2>>();
  std::puts("all correct");
}
