"""How many directions the vectors of tokens use."""

from torch import Tensor

from sra_ds.ops.precision import at_least_float32

MEASURED_TOKENS = 512
"""Tokens that facts of embeddings are measured on."""


def effective_rank(x_ND: Tensor) -> Tensor:
    """(sum of eigenvalues)^2 / sum of their squares, of the covariance of the rows: between 1 and D."""
    x_ND = at_least_float32(x_ND)
    centred_ND = x_ND - x_ND.mean(0)
    covariance_DD = centred_ND.T @ centred_ND
    return covariance_DD.trace().square() / covariance_DD.square().sum().clamp(min=1e-30)
