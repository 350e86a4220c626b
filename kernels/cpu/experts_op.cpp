// Feed-forward networks of all experts on the CPU: experts in parallel, the fullest first, each expert's
// products on one thread while its rows are in the cache. Weight gradients are written once, in place.
//
// oneDNN compiles a bf16 product for every number of rows it meets, so groups of short numbers are padded
// with zeros to a multiple of 8 rows; float32 products take any number.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <tuple>

#include "../stable.h"
#include "experts.h"
#include "number_of.h"

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
  int64_t fullest() const { return experts_ == 0 ? 0 : count(order_[0]); }

  // body(scratch, expert) for every expert, by as many threads as there are, each with its own scratch.
  template <class Scratch, class Body>
  void each(const Scratch& make_scratch, const Body& body) const {
    std::atomic<int64_t> next{0};
    const int64_t threads = std::min<int64_t>(stable::get_num_threads(), experts_);
    stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        auto scratch = make_scratch();
        for (int64_t i = next++; i < experts_; i = next++) body(scratch, order_[i]);
      }
    });
  }

 private:
  const int32_t* end_;
  int64_t experts_;
  std::vector<int64_t> order_;
};

char* row_of(const Tensor& matrix, int64_t row) {
  return static_cast<char*>(matrix.data_ptr()) + row * matrix.size(1) * matrix.element_size();
}

Tensor expert_of(const Tensor& stacked, int64_t e) {
  Tensor whole = stacked;
  return stable::select(whole, 0, e);
}

Tensor transposed(const Tensor& matrix) { return stable::transpose(matrix, 0, 1); }

int64_t padded(int64_t rows, Number number) { return number == Number::kFloat ? rows : (rows + 7) / 8 * 8; }

// A group's rows of a matrix: where they are, or copied in front of zeros.
class Rows {
 public:
  Rows(const Tensor& like, int64_t most, int64_t width) : buffer_(empty(like, {most, width}, like.scalar_type())) {}

  // At least `count` rows of `source` from `first` on, `total` in all.
  Tensor read(const Tensor& source, int64_t first, int64_t count, int64_t total) const {
    if (total == count) return rows(source, first, first + count);
    const int64_t bytes = source.size(1) * source.element_size();
    std::memcpy(buffer_.data_ptr(), row_of(source, first), count * bytes);
    std::memset(row_of(buffer_, count), 0, (total - count) * bytes);
    return first_rows(total);
  }

  // A place for `total` rows of which `count` will be kept in `target` from `first` on.
  Tensor place(const Tensor& target, int64_t first, int64_t count, int64_t total) const {
    return total == count ? rows(target, first, first + count) : first_rows(total);
  }

  // What was written to that place arrives in `target`.
  void keep(const Tensor& target, int64_t first, int64_t count, int64_t total) const {
    if (total != count)
      std::memcpy(row_of(target, first), buffer_.data_ptr(), count * target.size(1) * target.element_size());
  }

  Tensor first_rows(int64_t count) const { return rows(buffer_, 0, count); }

 private:
  Tensor buffer_;
};

OptionalTensor plain(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(detached(*tensor)) : std::nullopt;
}

const void* bias_of(const OptionalTensor& bias, int64_t e) {
  return bias.has_value() ? row_of(*bias, e) : nullptr;
}

void check(const Tensor& x, const Tensor& up_weight, const Tensor& down_weight, const Tensor& offsets) {
  STD_TORCH_CHECK(x.dim() == 2 && up_weight.dim() == 3 && down_weight.dim() == 3 && x.size(1) == up_weight.size(1),
                  "feed_forward: x R x D and stacked weights expected");
  STD_TORCH_CHECK(x.is_contiguous() && up_weight.is_contiguous() && down_weight.is_contiguous(),
                  "feed_forward: contiguous inputs expected");
  STD_TORCH_CHECK(x.scalar_type() == up_weight.scalar_type() && x.scalar_type() == down_weight.scalar_type(),
                  "feed_forward: x and weights of one type expected");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Int && offsets.size(0) == up_weight.size(0),
                  "feed_forward: int32 offsets, one per expert, expected");
  const int64_t experts = offsets.size(0);
  STD_TORCH_CHECK(experts > 0 && data<int32_t>(offsets)[experts - 1] == x.size(0),
                  "feed_forward: offsets must end at the number of rows");
}

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

// y and the hidden layer before its activation (gate: empty for gelu; up: with its bias).
Outputs feed_forward(const Tensor& x_history, const OptionalTensor& gate_history, const Tensor& up_history,
                     const OptionalTensor& up_bias, const Tensor& down_history,
                     const OptionalTensor& down_bias, const Tensor& offsets) {
  check(x_history, up_history, down_history, offsets);
  const Tensor x = detached(x_history), up_weight = detached(up_history), down_weight = detached(down_history);
  const OptionalTensor gate_weight = plain(gate_history);
  const Number number = number_of(x);
  const int64_t R = x.size(0), D = x.size(1), F = up_weight.size(2);
  const bool gated = gate_weight.has_value();
  Tensor y = stable::empty_like(x), up = empty(x, {R, F}, x.scalar_type());
  Tensor gate = empty(x, {gated ? R : 0, F}, x.scalar_type());

  const Groups groups(offsets);
  const int64_t most = padded(groups.fullest(), number);
  struct Scratch {
    Rows in, gate, up, active, out;
  };
  const auto scratch = [&] {
    const int64_t copied = number == Number::kFloat ? 0 : most;
    return Scratch{Rows(x, copied, D), Rows(x, gated ? copied : 0, F), Rows(x, copied, F), Rows(x, most, F),
                   Rows(x, copied, D)};
  };
  groups.each(scratch, [&](const Scratch& own, int64_t e) {
    const int64_t first = groups.start(e), count = groups.count(e), total = padded(count, number);
    if (count == 0) return;
    const Tensor in = own.in.read(x, first, count, total), ups = own.up.place(up, first, count, total);
    Hidden hidden{nullptr, ups.data_ptr(), F};
    multiply(in, expert_of(up_weight, e), ups);
    if (gated) {
      const Tensor gates = own.gate.place(gate, first, count, total);
      multiply(in, expert_of(*gate_weight, e), gates);
      hidden.gate = gates.data_ptr();
    }
    const Tensor active = own.active.first_rows(total), out = own.out.place(y, first, count, total);
    activate(number, hidden, bias_of(up_bias, e), total, active.data_ptr());
    multiply(active, expert_of(down_weight, e), out);
    own.up.keep(up, first, count, total);
    if (gated) own.gate.keep(gate, first, count, total);
    own.out.keep(y, first, count, total);
    if (down_bias.has_value()) add_bias(number, bias_of(down_bias, e), count, D, row_of(y, first));
  });
  return {y, gate, up};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of x, gate_weight, up_weight, up_bias, down_weight, down_bias; of what is absent empty ones.
Gradients feed_forward_backward(const Tensor& grad_history, const Tensor& x_history,
                                const OptionalTensor& gate_history, const Tensor& up_history,
                                const Tensor& down_history, const Tensor& offsets, const Tensor& gate,
                                const Tensor& up, bool biased) {
  const Tensor grad_y = detached(grad_history), x = detached(x_history);
  const Tensor up_weight = detached(up_history), down_weight = detached(down_history);
  const OptionalTensor gate_weight = plain(gate_history);
  const Number number = number_of(x);
  const ScalarType type = x.scalar_type();
  const int64_t E = up_weight.size(0), D = x.size(1), F = up_weight.size(2);
  const bool gated = gate_weight.has_value();
  Tensor grad_x = stable::empty_like(x), grad_up_weight = stable::empty_like(up_weight);
  Tensor grad_down_weight = stable::empty_like(down_weight);
  Tensor grad_gate_weight = empty(x, {gated ? E : 0, D, F}, type);
  Tensor grad_up_bias = empty(x, {biased ? E : 0, F}, type), grad_down_bias = empty(x, {biased ? E : 0, D}, type);

  const Groups groups(offsets);
  const int64_t most = padded(groups.fullest(), number);
  struct Scratch {
    Rows in, upstream, gate, up, active, grad_gate, grad_up, out, through_gate;
  };
  const auto scratch = [&] {
    const int64_t copied = number == Number::kFloat ? 0 : most;
    return Scratch{Rows(x, copied, D),           Rows(x, copied, D),        Rows(x, gated ? copied : 0, F),
                   Rows(x, copied, F),           Rows(x, most, F),          Rows(x, gated ? most : 0, F),
                   Rows(x, most, F),             Rows(x, copied, D),        Rows(x, gated ? most : 0, D)};
  };
  groups.each(scratch, [&](const Scratch& own, int64_t e) {
    const int64_t first = groups.start(e), count = groups.count(e), total = padded(count, number);
    const Tensor in = own.in.read(x, first, count, total);
    const Tensor upstream = own.upstream.read(grad_y, first, count, total);
    const Tensor active = own.active.first_rows(total), grad_up = own.grad_up.first_rows(total);
    Hidden hidden{nullptr, own.up.read(up, first, count, total).data_ptr(), F};
    Hidden grad{nullptr, grad_up.data_ptr(), F};
    if (gated) {
      hidden.gate = own.gate.read(gate, first, count, total).data_ptr();
      grad.gate = own.grad_gate.first_rows(total).data_ptr();
    }
    multiply(upstream, transposed(expert_of(down_weight, e)), grad_up);  // of active, for now
    activate_backward(number, hidden, grad_up.data_ptr(), total, active.data_ptr(), grad);

    multiply(transposed(active), upstream, expert_of(grad_down_weight, e));
    multiply(transposed(in), grad_up, expert_of(grad_up_weight, e));
    if (biased) {
      sum_columns(number, grad_up.data_ptr(), total, F, row_of(grad_up_bias, e));
      sum_columns(number, upstream.data_ptr(), total, D, row_of(grad_down_bias, e));
    }
    const Tensor out = own.out.place(grad_x, first, count, total);
    multiply(grad_up, transposed(expert_of(up_weight, e)), out);
    if (gated) {
      const Tensor grad_gate = own.grad_gate.first_rows(total), through = own.through_gate.first_rows(total);
      multiply(transposed(in), grad_gate, expert_of(grad_gate_weight, e));
      multiply(grad_gate, transposed(expert_of(*gate_weight, e)), through);
      add_rows(number, through.data_ptr(), total * D, out.data_ptr());
    }
    own.out.keep(grad_x, first, count, total);
  });
  return {grad_x, grad_gate_weight, grad_up_weight, grad_up_bias, grad_down_weight, grad_down_bias};
}

}  // namespace
}  // namespace sra::cpu

STABLE_TORCH_LIBRARY_IMPL(sra_kernels, CPU, m) {
  m.impl("feed_forward", TORCH_BOX(&sra::cpu::feed_forward));
  m.impl("feed_forward_backward", TORCH_BOX(&sra::cpu::feed_forward_backward));
}
