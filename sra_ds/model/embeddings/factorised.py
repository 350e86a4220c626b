"""A narrow table of token vectors and a map to the residual width, both also the head's (ALBERT, arXiv
1909.11942): what an embedding of limited rank is by itself, beside those whose map is given.

    x = table[token] M          tied logits = (h M^T) table^T
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import FactorisedEmbeddingConfig
from sra_ds.model.facts import Facts
from sra_ds.ops.linear import linear


class FactorisedEmbedding(nn.Module):
    """ids_BT, positions_BT -> (x_BTD, {}); tied logits through `output_factors`."""

    def __init__(self, config: FactorisedEmbeddingConfig, vocab_size: int, width: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.table_width = config.rank
        self.weight = nn.Parameter(torch.empty(vocab_size, config.rank))
        self.map_RD = nn.Parameter(torch.empty(config.rank, width))

    def forward(self, ids_BT: Tensor, positions_BT: Tensor) -> tuple[Tensor, Facts]:
        """Vectors of the tokens; positions enter in the mixer."""
        del positions_BT
        x_BTD = linear(F.embedding(ids_BT, self.weight), self.map_RD.T)
        return F.dropout(x_BTD, self.dropout, self.training), {}

    def output_factors(self, h_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(h', W_V) such that the tied logits are h' @ W_V.T; h' has `table_width` columns."""
        return linear(h_ND, self.map_RD), self.weight

    def tied_parameters(self) -> list[nn.Parameter]:
        """Parameters the head reads (ZeRO-3 has to fetch them for it)."""
        return [self.weight, self.map_RD]
