"""Hypergraph propagation among the experts of each token: P(w) = D^-1 H W B^-1 H^T.

H is the incidence (expert, hyperedge), W the hyperedges' weights, D = diag(H w) the experts' degrees and
B = diag(1^T H) the sizes of the hyperedges (Feng et al. 2019, arXiv 1809.09401, without the square roots:
rows of P sum to 1). Rows of experts a token does not go to are zero before D and B are found, so P is
K x K and never T x E x E. PyTorch Geometric's `HypergraphConv` computes the same with unit weights (a
test compares), but takes one graph for all nodes: T tokens with an active set each would be T graphs of K
nodes, with indices for every member, and its weights of hyperedges are inputs without a gradient of
their own parameter. Letters: T tokens, E experts, K experts per token, M hyperedges, D width.
"""

import torch
from torch import Tensor

from sra_ds.ops.precision import at_least_float32

EPS = 1e-6


def propagation(incidence_EM: Tensor, weights: Tensor, ids_TK: Tensor) -> Tensor:
    """P of each token among its experts, T x K x K. `weights` of the hyperedges are M, or T x M.

    An expert in no hyperedge hears nothing: its row is zero. In float32 at least.
    """
    member_TKM = at_least_float32(incidence_EM)[ids_TK]
    weights = at_least_float32(weights)
    weighted_TKM = member_TKM * (weights if weights.dim() == 1 else weights.unsqueeze(1))
    degree_TK1 = weighted_TKM.sum(-1, keepdim=True).clamp(min=EPS)
    size_T1M = member_TKM.sum(1, keepdim=True).clamp(min=EPS)
    return (weighted_TKM / size_T1M) @ member_TKM.transpose(1, 2) / degree_TK1


def propagation_reference(incidence_EM: Tensor, weights_M: Tensor, ids_TK: Tensor) -> Tensor:
    """Definition of `propagation` for weights M, token by token with diagonal matrices."""
    found = []
    for ids_K in ids_TK:
        H = incidence_EM[ids_K]
        inverse_D = torch.diag(1 / (H @ weights_M).clamp(min=EPS))
        inverse_B = torch.diag(1 / H.sum(0).clamp(min=EPS))
        found.append(inverse_D @ H @ torch.diag(weights_M) @ inverse_B @ H.T)
    return torch.stack(found)
