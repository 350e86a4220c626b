"""Embeddings: ids_BT, positions_T -> x_BTD, and what a tied head needs of them."""

from typing import Any

from torch import nn

from sra_ds.config.model import TokenEmbeddingConfig
from sra_ds.model.embeddings.token import TokenEmbedding

EMBEDDINGS: dict[type[Any], type[nn.Module]] = {TokenEmbeddingConfig: TokenEmbedding}
