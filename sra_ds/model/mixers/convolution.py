"""A gated causal convolution with a free filter for every channel: what a receptive field like that of
wavelet mixers does without wavelets.

    y = out(sigmoid(W x) * sum_k taps[k] x[t - k])

Letters: B sequences, T positions, D width, K taps.
"""

import torch
from torch import Tensor, nn

from sra_ds.config.model import ConvolutionConfig
from sra_ds.layers import Linear, ResidualLinear
from sra_ds.model.context import Context
from sra_ds.model.facts import Facts
from sra_ds.model.mixers.past import Cache, filterable, with_past
from sra_ds.ops.causal_filter import causal_filter
from sra_ds.ops.precision import at_least_float32


class Convolution(nn.Module):
    """x_BTD, context -> (y_BTD, facts)."""

    def __init__(self, config: ConvolutionConfig, width: int) -> None:
        super().__init__()
        self.taps_KD = nn.Parameter(torch.empty(config.taps, width))
        self.gates = Linear(width, width)
        self.out = ResidualLinear(width, width)

    def forward(self, x_BTD: Tensor, context: Context, cache: Cache = None) -> tuple[Tensor, Facts]:
        """Positions of other documents and padding count as zero; `cache` keeps the last inputs."""
        x_BSD = with_past(cache, "inputs", filterable(x_BTD, context), len(self.taps_KD) - 1)
        taps_KD = at_least_float32(self.taps_KD)
        found_BTD = causal_filter(x_BSD, taps_KD, 1, context.document_positions_BT)
        y_BTD: Tensor = self.out(self.gates(x_BTD).sigmoid() * found_BTD.to(x_BTD.dtype))
        return y_BTD, {}
