"""Linear layers of the whole model: torch's, by the faster product of this CPU, and two that start
otherwise.
"""

from torch import Tensor, nn

from sra_ds.ops.linear import linear


class Linear(nn.Linear):
    """x[..., I] -> [..., O]."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class ResidualLinear(Linear):
    """A projection that writes into the residual stream: its initial scale shrinks with depth."""


class ZeroLinear(Linear):
    """A projection that starts at zero: the model starts as if what it belongs to were not there."""
