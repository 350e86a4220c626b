"""A table of token vectors that is also the head's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import TokenEmbeddingConfig
from sra_ds.model.facts import Facts


class TokenEmbedding(nn.Module):
    """ids_BT, positions_BT -> (x_BTD, {}); tied logits through `output_factors`."""

    def __init__(self, config: TokenEmbeddingConfig, vocab_size: int, width: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.table_width = width
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, ids_BT: Tensor, positions_BT: Tensor) -> tuple[Tensor, Facts]:
        """Vectors of the tokens; positions enter in the mixer."""
        del positions_BT
        return F.dropout(F.embedding(ids_BT, self.weight), self.dropout, self.training), {}

    def output_factors(self, h_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(h', W_V) such that the tied logits are h' @ W_V.T; h' has `table_width` columns."""
        return h_ND, self.weight

    def tied_parameters(self) -> list[nn.Parameter]:
        """Parameters the head reads (ZeRO-3 has to fetch them for it)."""
        return [self.weight]
