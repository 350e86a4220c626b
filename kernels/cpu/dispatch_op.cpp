// Dispatch and combine on the CPU: tokens in parallel, each row read once and written once.
#include <algorithm>
#include <tuple>

#include "../number_of.h"
#include "../stable.h"
#include "dispatch.h"

namespace sra::cpu {
namespace {

namespace stable = torch::stable;

constexpr int64_t kTokensTogether = 64;

// body(first token, last token), in parallel.
template <class Body>
void each_token(int64_t tokens, const Body& body) {
  stable::parallel_for(0, tokens, kTokensTogether, body);
}

// Of rows R x D for `tokens` tokens; `place` is a permutation of the rows.
Routes routes_of(const char* name, const Tensor& place, const Tensor& rows, int64_t tokens, int64_t width) {
  const int64_t count = place.numel();
  STD_TORCH_CHECK(readable(place, ScalarType::Long, {count}, rows) && (tokens == 0 ? count == 0 : count % tokens == 0),
                  name, ": a row for every route of ", tokens, " tokens expected, got ", shape(place));
  const int64_t* row = data<int64_t>(place);
  STD_TORCH_CHECK(std::all_of(row, row + count, [&](int64_t r) { return r >= 0 && r < count; }), name,
                  ": rows between 0 and ", count - 1, " expected");
  return {row, tokens == 0 ? 0 : count / tokens, width};
}

void check_rows(const char* name, const Tensor& rows, int64_t count) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == count && rows.is_contiguous(), name, ": ", count,
                  " contiguous rows expected, got ", shape(rows));
}

Tensor dispatch(const Tensor& x, const Tensor& place) {
  check_rows("dispatch", x, x.size(0));
  const int64_t T = x.size(0), D = x.size(1);
  const Number number = number_of(x);
  Tensor rows_RD = empty(x, {place.numel(), D}, x.scalar_type());
  const Routes routes = routes_of("dispatch", place, x, T, D);
  each_token(T, [&](int64_t first, int64_t last) {
    spread_rows(number, routes, x.data_ptr(), first, last, rows_RD.data_ptr());
  });
  return rows_RD;
}

Tensor summed(const Tensor& rows, const OptionalTensor& gates, const Tensor& place, int64_t tokens) {
  check_rows("combine", rows, place.numel());
  const int64_t D = rows.size(1);
  const Number number = number_of(rows);
  Tensor out_TD = empty(rows, {tokens, D}, rows.scalar_type());
  const Routes routes = routes_of("combine", place, rows, tokens, D);
  each_token(tokens, [&](int64_t first, int64_t last) {
    sum_rows(number, routes, rows.data_ptr(), data_or_null<float>(gates), first, last, out_TD.data_ptr());
  });
  return out_TD;
}

Tensor dispatch_backward(const Tensor& grad_rows, const Tensor& place, int64_t tokens) {
  return summed(grad_rows, std::nullopt, place, tokens);
}

void check_gates(const Tensor& gates, const Tensor& place) {
  STD_TORCH_CHECK(gates.dim() == 2 && gates.numel() == place.numel() && gates.is_contiguous() &&
                      gates.scalar_type() == ScalarType::Float,
                  "combine: float32 gates T x K, one for each of ", place.numel(), " routes, expected, got ",
                  shape(gates));
}

Tensor combine(const Tensor& rows, const Tensor& gates, const Tensor& place) {
  check_gates(gates, place);
  return summed(rows, gates, place, gates.size(0));
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad, const Tensor& rows, const Tensor& gates,
                                            const Tensor& place) {
  const int64_t T = gates.size(0);
  check_gates(gates, place);
  check_rows("combine", rows, place.numel());
  STD_TORCH_CHECK(readable(grad, rows.scalar_type(), {T, rows.size(1)}, rows),
                  "combine: a gradient like its result expected, got ", shape(grad));
  const Number number = number_of(rows);
  Tensor grad_rows = stable::empty_like(rows), grad_gates = stable::empty_like(gates);
  const Routes routes = routes_of("combine", place, rows, T, rows.size(1));
  each_token(T, [&](int64_t first, int64_t last) {
    sum_rows_backward(number, routes, grad.data_ptr(), rows.data_ptr(), data<float>(gates), first, last,
                      grad_rows.data_ptr(), data<float>(grad_gates));
  });
  return {grad_rows, grad_gates};
}

}  // namespace
}  // namespace sra::cpu

STABLE_TORCH_LIBRARY_IMPL(sra_kernels, CPU, m) {
  m.impl("dispatch", TORCH_BOX(&sra::cpu::dispatch));
  m.impl("dispatch_backward", TORCH_BOX(&sra::cpu::dispatch_backward));
  m.impl("combine", TORCH_BOX(&sra::cpu::combine));
  m.impl("combine_backward", TORCH_BOX(&sra::cpu::combine_backward));
}
