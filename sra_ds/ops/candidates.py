"""The likeliest tokens of each state, without ever holding all logits, and their mean vector.

    ids = the m largest of u E^T        z = their logits        mean = sum_m softmax(z)_m E[ids_m]

softmax(z) is the distribution over all tokens, renormalised over the m. Gradients reach u and E through z
and through the mean; no N x m x D tensor exists. Letters: N tokens, D width, V vocabulary, M candidates.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_ds.ops.linear import linear
from sra_ds.ops.precision import at_least_float32


class Candidates(NamedTuple):
    """The likeliest tokens of each state in falling order, N x M, their logits, and the entropy in nats
    of the distribution over all tokens; logits and entropy in float32 at least. No gradient."""

    ids_NM: Tensor
    logits_NM: Tensor
    entropy_N: Tensor


@torch.no_grad()
def candidates(u_ND: Tensor, weight_VD: Tensor, count: int, chunk_tokens: int) -> Candidates:
    """At most `chunk_tokens` x V logits exist at a time; `count` <= V."""
    parts = []
    for u_CD in u_ND.split(chunk_tokens):
        logits_CV = at_least_float32(linear(u_CD, weight_VD))
        logits_CM, ids_CM = logits_CV.topk(count)
        below_CV = logits_CV.sub_(logits_CM[:, :1])
        weights_CV = below_CV.exp()
        total_C = weights_CV.sum(-1)
        entropy_C = total_C.log() - below_CV.mul_(weights_CV).sum(-1) / total_C
        parts.append((ids_CM, logits_CM, entropy_C))
    return Candidates(*(torch.cat(found) for found in zip(*parts, strict=True)))


def mean_candidate(u_ND: Tensor, weight_VD: Tensor, found: Candidates) -> Tensor:
    """mean_ND of the candidates' rows of E, weighted by their probabilities."""
    logits_NM = _GatheredLogits.apply(u_ND, weight_VD, found.ids_NM, found.logits_NM)
    return _mix(weight_VD, found.ids_NM, logits_NM.softmax(-1))


def mean_candidate_reference(u_ND: Tensor, weight_VD: Tensor, count: int) -> Tensor:
    """Definition of `mean_candidate` of the `count` likeliest, with all logits at once."""
    logits_NM, ids_NM = at_least_float32(u_ND @ weight_VD.T).topk(count)
    shares_NM = logits_NM.softmax(-1).to(weight_VD.dtype)
    return (shares_NM.unsqueeze(-1) * weight_VD[ids_NM]).sum(1)


def _mix(weight_VD: Tensor, ids_NM: Tensor, shares_NM: Tensor) -> Tensor:
    """sum_m shares[n, m] * weight[ids[n, m]]."""
    shares_NM = shares_NM.to(weight_VD.dtype)
    return F.embedding_bag(ids_NM, weight_VD, per_sample_weights=shares_NM, mode="sum")


class _GatheredLogits(torch.autograd.Function):
    """Logits that are known already, with the gradients of u[n] . E[ids[n, m]]."""

    @staticmethod
    def forward(
        ctx: Any, u_ND: Tensor, weight_VD: Tensor, ids_NM: Tensor, logits_NM: Tensor
    ) -> Tensor:
        ctx.save_for_backward(u_ND, weight_VD, ids_NM)
        return logits_NM.clone()

    @staticmethod
    def backward(ctx: Any, d_logits_NM: Tensor) -> tuple[Tensor, Tensor, None, None]:
        u_ND, weight_VD, ids_NM = ctx.saved_tensors
        with (
            torch.enable_grad()
        ):  # d/dE of sum_m dz_m u.E[ids_m] is that of u.(sum_m dz_m E[ids_m])
            weight_VD = weight_VD.detach().requires_grad_()
            d_u_ND = _mix(weight_VD, ids_NM, d_logits_NM)
            (d_weight_VD,) = torch.autograd.grad(d_u_ND, weight_VD, u_ND)
        return d_u_ND.detach(), d_weight_VD, None, None
