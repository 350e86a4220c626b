// Feed-forward networks of all experts on the CPU: experts in parallel, the fullest first, each expert's
// products on one thread while its rows are in the cache. Groups may be padded with rows of zeros.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <tuple>

#include "../stable.h"
#include "experts.h"
#include "../number_of.h"
#include "product.h"
#include "stream.h"

namespace sra::cpu {
namespace {

namespace stable = torch::stable;

// Rows [start(e), start(e) + count(e)) belong to expert e.
class Groups {
 public:
  explicit Groups(const Tensor& offsets) : end_(data<const int32_t>(offsets)), experts_(offsets.size(0)) {
    order_.resize(experts_);
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return count(a) > count(b); });
  }

  int64_t start(int64_t e) const { return e == 0 ? 0 : end_[e - 1]; }
  int64_t count(int64_t e) const { return end_[e] - start(e); }

  // body(expert) for every expert, by as many threads as there are.
  template <class Body>
  void each(const Body& body) const {
    std::atomic<int64_t> next{0};
    const int64_t threads = std::min<int64_t>(stable::get_num_threads(), experts_);
    stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread)
        for (int64_t i = next++; i < experts_; i = next++) body(order_[i]);
    });
  }

 private:
  const int32_t* end_;
  int64_t experts_;
  std::vector<int64_t> order_;
};

Tensor expert_of(const Tensor& stacked, int64_t e) {
  Tensor whole = stacked;
  return stable::select(whole, 0, e);
}

// A group's rows of a matrix: where they are, or copied in front of zeros.
Tensor padded(const Tensor& matrix, int64_t first, int64_t count, int64_t total) {
  if (total == count) return rows(matrix, first, first + count);
  Tensor copy = empty(matrix, {total, matrix.size(1)}, matrix.scalar_type());
  const int64_t row_bytes = matrix.size(1) * matrix.element_size();
  std::memcpy(copy.data_ptr(), row_of(matrix, first), count * row_bytes);
  std::memset(row_of(copy, count), 0, (total - count) * row_bytes);
  return copy;
}

// The first rows of `part` become rows of `whole` from `first` on.
void keep(const Tensor& part, const Tensor& whole, int64_t first, int64_t count) {
  std::memcpy(row_of(whole, first), part.data_ptr(), count * whole.size(1) * whole.element_size());
}

// `matrix` becomes expert e's.
void keep_expert(const Tensor& matrix, const Tensor& stacked, int64_t e) {
  const int64_t bytes = matrix.size(0) * matrix.size(1) * matrix.element_size();
  stream_copy(static_cast<char*>(stacked.data_ptr()) + e * bytes, matrix.data_ptr(), bytes);
}

OptionalTensor plain(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(detached(*tensor)) : std::nullopt;
}

const void* bias_of(const OptionalTensor& bias, int64_t e) {
  return bias.has_value() ? row_of(*bias, e) : nullptr;
}

void check(const Tensor& x, const OptionalTensor& gate_weight, const Tensor& up_weight,
           const Tensor& down_weight, const Tensor& offsets) {
  STD_TORCH_CHECK(x.dim() == 2 && up_weight.dim() == 3 && down_weight.dim() == 3 &&
                      x.size(1) == up_weight.size(1) && up_weight.size(2) == down_weight.size(1),
                  "feed_forward: x R x D, up E x D x F and down E x F x D expected, got ", shape(x), ", ",
                  shape(up_weight), " and ", shape(down_weight));
  const int64_t experts = up_weight.size(0), width = x.size(1), hidden = up_weight.size(2);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.is_contiguous() && readable(up_weight, type, {experts, width, hidden}, x) &&
                      readable(gate_weight, type, {experts, width, hidden}, x) &&
                      readable(down_weight, type, {experts, hidden, width}, x),
                  "feed_forward: x and weights of one type, contiguous, expected");
  STD_TORCH_CHECK(experts > 0 && readable(offsets, ScalarType::Int, {experts}, x),
                  "feed_forward: int32 offsets, one for each of ", experts, " experts, expected, got ",
                  shape(offsets));
  const int32_t* end = data<int32_t>(offsets);
  STD_TORCH_CHECK(end[0] >= 0 && std::is_sorted(end, end + experts) && end[experts - 1] == x.size(0),
                  "feed_forward: offsets must not decrease and end at the number of rows, ", x.size(0));
}

void check_biases(const Tensor& x, bool gated, const OptionalTensor& up_bias, const OptionalTensor& down_bias,
                  int64_t experts, int64_t hidden) {
  STD_TORCH_CHECK(up_bias.has_value() == down_bias.has_value() && !(gated && up_bias.has_value()),
                  "feed_forward: both biases without a gate, or none, expected");
  STD_TORCH_CHECK(readable(up_bias, x.scalar_type(), {experts, hidden}, x) &&
                      readable(down_bias, x.scalar_type(), {experts, x.size(1)}, x),
                  "feed_forward: biases of x's type, E x F and E x D, contiguous, expected");
}

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

// y and the hidden layer before its activation (gate: empty for gelu; up: with its bias).
Outputs feed_forward(const Tensor& x_any, const OptionalTensor& gate_any, const Tensor& up_any,
                     const OptionalTensor& up_bias, const Tensor& down_any,
                     const OptionalTensor& down_bias, const Tensor& offsets) {
  check(x_any, gate_any, up_any, down_any, offsets);
  check_biases(x_any, gate_any.has_value(), up_bias, down_bias, up_any.size(0), up_any.size(2));
  const Tensor x = detached(x_any), up_weight = detached(up_any), down_weight = detached(down_any);
  const OptionalTensor gate_weight = plain(gate_any);
  const Number number = number_of(x);
  const int64_t R = x.size(0), D = x.size(1), F = up_weight.size(2);
  const bool gated = gate_weight.has_value();
  Tensor y = stable::empty_like(x), up = empty(x, {R, F}, x.scalar_type());
  Tensor gate = empty(x, {gated ? R : 0, F}, x.scalar_type());

  const Groups groups(offsets);
  groups.each([&](int64_t e) {
    const int64_t first = groups.start(e), count = groups.count(e), total = padded_rows(count, x.scalar_type());
    if (count == 0) return;
    const Tensor in = padded(x, first, count, total), ups = product(in, expert_of(up_weight, e));
    Hidden hidden{nullptr, ups.data_ptr(), F};
    Tensor gates = gated ? product(in, expert_of(*gate_weight, e)) : ups;
    if (gated) hidden.gate = gates.data_ptr();
    const Tensor active = empty(x, {total, F}, x.scalar_type());
    activate(number, hidden, bias_of(up_bias, e), total, active.data_ptr());
    keep(ups, up, first, count);
    if (gated) keep(gates, gate, first, count);
    const Tensor out = product(active, expert_of(down_weight, e));
    if (down_bias.has_value()) add_bias(number, bias_of(down_bias, e), count, D, out.data_ptr());
    keep(out, y, first, count);
  });
  return {y, gate, up};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of x, gate_weight, up_weight, up_bias, down_weight, down_bias; of what is absent empty ones.
Gradients feed_forward_backward(const Tensor& grad_any, const Tensor& x_any,
                                const OptionalTensor& gate_any, const Tensor& up_any,
                                const Tensor& down_any, const Tensor& offsets, const Tensor& gate,
                                const Tensor& up, bool biased) {
  check(x_any, gate_any, up_any, down_any, offsets);
  STD_TORCH_CHECK(readable(grad_any, x_any.scalar_type(), {x_any.size(0), x_any.size(1)}, x_any),
                  "feed_forward: a gradient like y expected, got ", shape(grad_any));
  const Tensor grad_y = detached(grad_any), x = detached(x_any);
  const Tensor up_weight = detached(up_any), down_weight = detached(down_any);
  const OptionalTensor gate_weight = plain(gate_any);
  const Number number = number_of(x);
  const ScalarType type = x.scalar_type();
  const int64_t E = up_weight.size(0), D = x.size(1), F = up_weight.size(2);
  const bool gated = gate_weight.has_value();
  Tensor grad_x = stable::empty_like(x), grad_up_weight = stable::empty_like(up_weight);
  Tensor grad_down_weight = stable::empty_like(down_weight);
  Tensor grad_gate_weight = empty(x, {gated ? E : 0, D, F}, type);
  Tensor grad_up_bias = empty(x, {biased ? E : 0, F}, type), grad_down_bias = empty(x, {biased ? E : 0, D}, type);

  const Groups groups(offsets);
  groups.each([&](int64_t e) {
    const int64_t first = groups.start(e), count = groups.count(e), total = padded_rows(count, type);
    const Tensor in = padded(x, first, count, total), upstream = padded(grad_y, first, count, total);
    const Tensor ups = padded(up, first, count, total), gates = gated ? padded(gate, first, count, total) : ups;
    const Tensor active = empty(x, {total, F}, type), grad_gate = gated ? empty(x, {total, F}, type) : active;
    const Tensor grad_up = product(upstream, transposed(expert_of(down_weight, e)));  // of active, for now
    const Hidden hidden{gated ? gates.data_ptr() : nullptr, ups.data_ptr(), F};
    const Hidden grad{gated ? grad_gate.data_ptr() : nullptr, grad_up.data_ptr(), F};
    activate_backward(number, hidden, grad_up.data_ptr(), total, active.data_ptr(), grad);

    keep_expert(product(transposed(active), upstream), grad_down_weight, e);
    keep_expert(product(transposed(in), grad_up), grad_up_weight, e);
    if (biased) {
      sum_columns(number, grad_up.data_ptr(), total, F, row_of(grad_up_bias, e));
      sum_columns(number, upstream.data_ptr(), total, D, row_of(grad_down_bias, e));
    }
    const Tensor out = product(grad_up, transposed(expert_of(up_weight, e)));
    if (gated) {
      keep_expert(product(transposed(in), grad_gate), grad_gate_weight, e);
      const Tensor through_gate = product(grad_gate, transposed(expert_of(*gate_weight, e)));
      add_rows(number, through_gate.data_ptr(), total * D, out.data_ptr());
    }
    keep(out, grad_x, first, count);
  });
  return {grad_x, grad_gate_weight, grad_up_weight, grad_up_bias, grad_down_weight, grad_down_bias};
}

}  // namespace
}  // namespace sra::cpu

STABLE_TORCH_LIBRARY_IMPL(sra_kernels, CPU, m) {
  m.impl("feed_forward", TORCH_BOX(&sra::cpu::feed_forward));
  m.impl("feed_forward_backward", TORCH_BOX(&sra::cpu::feed_forward_backward));
}
