"""Logits and loss through the embedding's table."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sra_ds.config.model import TiedHeadConfig
from sra_ds.model.facts import Facts
from sra_ds.ops.linear import linear
from sra_ds.ops.linear_cross_entropy import linear_cross_entropy, linear_scores
from sra_ds.ops.precision import at_least_float32


class TiedTable(Protocol):
    """The embedding's side of a tied head."""

    def output_factors(self, h_ND: Tensor) -> tuple[Tensor, Tensor]: ...


class HeadOutput(NamedTuple):
    """Logits N x V without targets; with them the summed loss, each token's loss and, outside
    training, whether its target had the largest logit. And what the head found out on the way."""

    logits_NV: Tensor | None = None
    loss_sum: Tensor | None = None
    nll_N: Tensor | None = None
    correct_N: Tensor | None = None
    facts: Facts | None = None


class TiedHead(nn.Module):
    """h -> logits, or with targets the summed loss without ever holding all logits."""

    def __init__(self, config: TiedHeadConfig, table_width: int) -> None:
        super().__init__()
        del table_width
        self.chunk_tokens = config.chunk_tokens

    def forward(
        self, h_ND: Tensor, table: TiedTable, targets_N: Tensor | None = None
    ) -> HeadOutput:
        """Logits in float32 at least; losses in chunks of `chunk_tokens` tokens."""
        return score(*table.output_factors(h_ND), targets_N, self.chunk_tokens)


def score(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor | None, chunk_tokens: int
) -> HeadOutput:
    """The fully normalised distribution of h @ weight.T, or with targets their loss under it."""
    if targets_N is None:
        return HeadOutput(logits_NV=at_least_float32(linear(h_ND, weight_VD)))
    if torch.is_grad_enabled():
        loss_sum, nll_N = linear_cross_entropy(h_ND, weight_VD, targets_N, chunk_tokens)
        return HeadOutput(loss_sum=loss_sum, nll_N=nll_N)
    nll_N, correct_N = linear_scores(h_ND, weight_VD, targets_N, chunk_tokens)
    return HeadOutput(loss_sum=nll_N.sum(), nll_N=nll_N, correct_N=correct_N)
