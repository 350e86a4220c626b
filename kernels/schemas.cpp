// The operators' schemas; implementations register themselves in cpu/ and cuda/.
#include "stable.h"

STABLE_TORCH_LIBRARY(sra_kernels, m) {
  m.def(
      "cosine_route(Tensor x, Tensor anchors, Tensor temperature, int top_k, int gate, Tensor? valid, "
      "Tensor? selection_bias, Tensor? noise) -> (Tensor gates, Tensor ids, Tensor load, Tensor mean_probs, "
      "Tensor lse, Tensor dots, Tensor inverse_x, Tensor inverse_a)");
  m.def(
      "cosine_route_backward(Tensor grad_gates, Tensor grad_mean_probs, Tensor grad_lse, Tensor x, Tensor "
      "anchors, Tensor temperature, int gate, Tensor? valid, Tensor ids, Tensor lse, Tensor dots, Tensor "
      "inverse_x, Tensor inverse_a) -> (Tensor, Tensor, Tensor)");
}
