"""Cross-entropy of a linear head without ever holding all logits.

Logits exist for one chunk of tokens at a time. Their gradient is formed in the same pass, while they
are there, so the head costs three matrix products a step instead of the four of recomputation; the
backward pass only scales. Letters: N tokens, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_ds.ops.linear import linear, outer_sum
from sra_ds.ops.precision import at_least_float32

IGNORED = -100


def linear_cross_entropy(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Summed loss and the loss of each token, both float32 (float64 for float64 input).

    Targets of -100 count nothing. The token losses carry no gradient. At most `chunk_tokens` x V logits
    exist at a time.
    """
    loss: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(
        h_ND, weight_VD, targets_N, chunk_tokens
    )
    return loss


@torch.no_grad()
def linear_scores(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """For evaluation: the loss of each token, and whether its target has the largest logit."""
    parts = []
    for h_CD, targets_C in zip(
        h_ND.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True
    ):
        logits_CV = at_least_float32(linear(h_CD, weight_VD))
        nll_C = F.cross_entropy(logits_CV, targets_C, ignore_index=IGNORED, reduction="none")
        parts.append((nll_C, logits_CV.argmax(-1) == targets_C))
    nlls, hits = zip(*parts, strict=True)
    return torch.cat(nlls), torch.cat(hits)


def linear_cross_entropy_reference(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Definition of `linear_cross_entropy` with all logits at once."""
    logits_NV = at_least_float32(h_ND @ weight_VD.T)
    nll_N = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="none")
    return nll_N.sum(), nll_N.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(h_ND.dtype, torch.float32)
        nll_N = torch.empty(len(targets_N), dtype=wide, device=h_ND.device)
        grad_h_ND = torch.empty_like(h_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide)
        for start in range(0, len(targets_N), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            h_CD = h_ND[rows]
            logits_CV = at_least_float32(linear(h_CD, weight_VD))
            nll_N[rows], grad_CV = _losses_and_gradient_in_place(logits_CV, targets_N[rows])
            del logits_CV
            grad_CV = grad_CV.to(h_ND.dtype)
            grad_h_ND[rows] = linear(grad_CV, weight_VD.T)
            grad_weight_VD += outer_sum(grad_CV, h_CD)
            del grad_CV  # before the next one is made
        ctx.save_for_backward(grad_h_ND, grad_weight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(nll_N)
        return nll_N.sum(), nll_N

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, grad_nll: Tensor) -> tuple[Tensor, Tensor, None, None]:
        del grad_nll
        grad_h_ND, grad_weight_VD = ctx.saved_tensors
        scale = grad_sum.to(grad_h_ND.dtype)
        return grad_h_ND * scale, grad_weight_VD * scale, None, None


def _losses_and_gradient_in_place(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each token, and the gradient of their sum in the place of the logits."""
    counted_C1 = (targets_C != IGNORED).to(logits_CV.dtype).unsqueeze(1)
    index_C1 = targets_C.clamp(min=0).unsqueeze(1)
    right_C1, largest_C1 = logits_CV.gather(1, index_C1), logits_CV.amax(1, keepdim=True)
    grad_CV = logits_CV.sub_(largest_C1).exp_()
    sum_C1 = grad_CV.sum(1, keepdim=True)
    nll_C1 = (largest_C1 + sum_C1.log() - right_C1) * counted_C1
    grad_CV.mul_(counted_C1 / sum_C1).scatter_add_(1, index_C1, -counted_C1)
    return nll_C1.squeeze(1), grad_CV
