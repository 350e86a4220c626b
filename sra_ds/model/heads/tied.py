"""Logits and loss through the embedding's table."""

from typing import Protocol

from torch import Tensor, nn

from sra_ds.config.model import TiedHeadConfig
from sra_ds.ops.linear_cross_entropy import linear_cross_entropy
from sra_ds.ops.precision import at_least_float32


class TiedTable(Protocol):
    """The embedding's side of a tied head."""

    def output_factors(self, h_ND: Tensor) -> tuple[Tensor, Tensor]: ...


class TiedHead(nn.Module):
    """h -> logits, or with targets the summed loss without ever holding all logits."""

    def __init__(self, config: TiedHeadConfig) -> None:
        super().__init__()
        self.chunk_tokens = config.chunk_tokens

    def forward(
        self, h_ND: Tensor, table: TiedTable, targets_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """With targets (loss_sum, nll_N), else (logits_NV in float32 at least, None)."""
        h_ND, weight_VD = table.output_factors(h_ND)
        if targets_N is None:
            return at_least_float32(h_ND @ weight_VD.T), None
        return linear_cross_entropy(h_ND, weight_VD, targets_N, self.chunk_tokens)
