"""Embeddings: from token ids to the first vectors of the residual stream."""

from typing import Annotated, Literal

from pydantic import Field

from sra_ds.config.base import Part, by_name
from sra_ds.config.model.primes import DistinctPrimes


class TokenEmbeddingConfig(Part):
    """A table of one vector per token, shared with the head."""

    kind: Literal["token"] = "token"
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the embedded tokens."""


class PrimeHilbertEmbeddingConfig(Part):
    """Tokens and positions in one subspace per prime: a small table, projected into each subspace, plus
    the position's orthonormal code modulo that prime; the head shares the table."""

    kind: Literal["prime_hilbert"] = "prime_hilbert"
    table_width: int = Field(128, ge=1)
    """Width d0 of the table of tokens."""
    primes: DistinctPrimes = (7, 11, 13, 17, 19)
    """Positions are told apart up to the product of these."""
    copies: int = Field(4, ge=1)
    """Dimensions of a subspace over its prime (m)."""
    token_skip: bool = True
    """Add a direct linear map of the table, whose rank the subspaces do not limit."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the embedded tokens."""


EmbeddingConfig = Annotated[
    TokenEmbeddingConfig | PrimeHilbertEmbeddingConfig,
    Field(discriminator="kind"),
    by_name("kind", "token"),
]
