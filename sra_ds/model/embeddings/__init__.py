"""Embeddings: ids_BT, positions_BT -> (x_BTD, facts), and what a tied head needs of them."""

from typing import Any

from torch import nn

from sra_ds.config.model import (
    FactorisedEmbeddingConfig,
    HybridEmbeddingConfig,
    PrimeHilbertEmbeddingConfig,
    SpectralEmbeddingConfig,
    TokenEmbeddingConfig,
)
from sra_ds.model.embeddings.factorised import FactorisedEmbedding
from sra_ds.model.embeddings.prime_hilbert import PrimeHilbertEmbedding
from sra_ds.model.embeddings.spectral import HybridEmbedding, SpectralEmbedding
from sra_ds.model.embeddings.token import TokenEmbedding

EMBEDDINGS: dict[type[Any], type[nn.Module]] = {
    TokenEmbeddingConfig: TokenEmbedding,
    PrimeHilbertEmbeddingConfig: PrimeHilbertEmbedding,
    FactorisedEmbeddingConfig: FactorisedEmbedding,
    SpectralEmbeddingConfig: SpectralEmbedding,
    HybridEmbeddingConfig: HybridEmbedding,
}
