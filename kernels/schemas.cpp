// The operators' schemas; implementations register themselves in cpu/ and cuda/.
#include "stable.h"

STABLE_TORCH_LIBRARY(sra_kernels, m) {
  m.def(
      "cosine_route(Tensor x, Tensor anchors, Tensor temperature, int top_k, int gate, bool fused, Tensor? "
      "valid, Tensor? selection_bias, Tensor? noise) -> (Tensor gates, Tensor ids, Tensor load, Tensor "
      "mean_probs, Tensor lse, Tensor valid_count, Tensor dots, Tensor inverse_x, Tensor inverse_a)");
  m.def(
      "cosine_route_backward(Tensor grad_gates, Tensor grad_mean_probs, Tensor grad_lse, Tensor x, Tensor "
      "anchors, Tensor temperature, int gate, bool fused, Tensor? valid, Tensor ids, Tensor lse, Tensor "
      "valid_count, Tensor dots, Tensor inverse_x, Tensor inverse_a) -> (Tensor, Tensor, Tensor)");
  m.def(
      "feed_forward(Tensor x, Tensor? gate_weight, Tensor up_weight, Tensor? up_bias, Tensor down_weight, "
      "Tensor? down_bias, Tensor offsets) -> (Tensor y, Tensor gate, Tensor up)");
  m.def(
      "feed_forward_backward(Tensor grad_y, Tensor x, Tensor? gate_weight, Tensor up_weight, Tensor "
      "down_weight, Tensor offsets, Tensor gate, Tensor up, bool biased) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("onednn_is_faster() -> bool");
  m.def("dispatch(Tensor x, Tensor place) -> Tensor");
  m.def("dispatch_backward(Tensor grad_rows, Tensor place, int tokens) -> Tensor");
  m.def("combine(Tensor rows, Tensor gates, Tensor place) -> Tensor");
  m.def("combine_backward(Tensor grad, Tensor rows, Tensor gates, Tensor place) -> (Tensor, Tensor)");
  m.def(
      "prime_blocks(Tensor x, Tensor blocks, int[] primes, int rows, bool inputs_first) -> "
      "Tensor");
  m.def(
      "prime_blocks_backward(Tensor grad, Tensor x, Tensor blocks, int[] primes, bool inputs_first) -> (Tensor, "
      "Tensor)");
}
