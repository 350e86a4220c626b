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


class FactorisedEmbeddingConfig(Part):
    """A narrow table and a map to the residual width, shared with the head."""

    kind: Literal["factorised"] = "factorised"
    rank: int = Field(128, ge=1)
    """Width of the table."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the embedded tokens."""


class HarmonicsConfig(Part):
    """What embeddings made of waves share."""

    harmonics: int = Field(64, ge=1)
    """Waves H, each with an amplitude and a phase per token; the rank is at most 2 H."""
    frequencies: Literal["fixed", "learnable"] = "fixed"
    """Whole numbers of periods, whose waves are orthonormal; or moved from there by training."""
    coefficients: Literal["cartesian", "polar"] = "cartesian"
    """What is trained: the weights of sine and cosine, or amplitude and phase."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the embedded tokens."""


class SpectralEmbeddingConfig(HarmonicsConfig):
    """A token is a sum of waves along the residual width, shared with the head."""

    kind: Literal["spectral"] = "spectral"


class HybridEmbeddingConfig(HarmonicsConfig):
    """A table of one vector per token, mixed with a sum of waves in a proportion that is learned."""

    kind: Literal["hybrid"] = "hybrid"
    ratio: float = Field(0.5, gt=0, lt=1)
    """Share of the waves when the ramp ends; learned from there."""
    ramp: float = Field(0.2, ge=0, le=1)
    """Share of the steps over which the waves' share grows from 0 to `ratio`."""


EmbeddingConfig = Annotated[
    TokenEmbeddingConfig
    | PrimeHilbertEmbeddingConfig
    | FactorisedEmbeddingConfig
    | SpectralEmbeddingConfig
    | HybridEmbeddingConfig,
    Field(discriminator="kind"),
    by_name("kind", "token"),
]
