// Dispatch and combine on the CPU: tokens in parallel, each row read once and written once.
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

Routes routes_of(const Tensor& place, int64_t tokens, int64_t width) {
  return {data<int64_t>(place), tokens == 0 ? 0 : place.numel() / tokens, width};
}

Tensor dispatch(const Tensor& x, const Tensor& place) {
  const int64_t T = x.size(0), D = x.size(1);
  const Number number = number_of(x);
  Tensor rows_RD = empty(x, {place.numel(), D}, x.scalar_type());
  const Routes routes = routes_of(place, T, D);
  each_token(T, [&](int64_t first, int64_t last) {
    spread_rows(number, routes, x.data_ptr(), first, last, rows_RD.data_ptr());
  });
  return rows_RD;
}

Tensor summed(const Tensor& rows, const OptionalTensor& gates, const Tensor& place, int64_t tokens) {
  const int64_t D = rows.size(1);
  const Number number = number_of(rows);
  Tensor out_TD = empty(rows, {tokens, D}, rows.scalar_type());
  const Routes routes = routes_of(place, tokens, D);
  each_token(tokens, [&](int64_t first, int64_t last) {
    sum_rows(number, routes, rows.data_ptr(), data_or_null<float>(gates), first, last, out_TD.data_ptr());
  });
  return out_TD;
}

Tensor dispatch_backward(const Tensor& grad_rows, const Tensor& place, int64_t tokens) {
  return summed(grad_rows, std::nullopt, place, tokens);
}

Tensor combine(const Tensor& rows, const Tensor& gates, const Tensor& place) {
  return summed(rows, gates, place, gates.size(0));
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad, const Tensor& rows, const Tensor& gates,
                                            const Tensor& place) {
  const int64_t T = gates.size(0);
  const Number number = number_of(rows);
  Tensor grad_rows = stable::empty_like(rows), grad_gates = stable::empty_like(gates);
  const Routes routes = routes_of(place, T, rows.size(1));
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
