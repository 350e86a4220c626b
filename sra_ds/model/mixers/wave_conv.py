"""Bands of the input, each channel of each weighed by a gate that its position sets.

    y = out(sum_b sigmoid(W_b x) * b),     gates 1 / (J + 1) at the start

over the bands b of `sra_ds.model.mixers.bands`. Letters: B sequences, T positions, D width, J levels.
"""

import torch
from torch import Tensor, nn

from sra_ds.config.model import WaveConvConfig
from sra_ds.layers import Linear, ResidualLinear
from sra_ds.model.context import Context
from sra_ds.model.facts import Facts
from sra_ds.model.mixers.bands import decompose, filter_penalty, measure
from sra_ds.model.mixers.filters import LowPass
from sra_ds.model.mixers.past import Cache, filterable


class BandGates(Linear):
    """A gate for every channel of every band."""

    def __init__(self, width: int, bands: int) -> None:
        super().__init__(width, bands * width)
        self.bands = bands


class WaveConv(nn.Module):
    """x_BTD, context -> (y_BTD, facts)."""

    def __init__(self, config: WaveConvConfig, width: int) -> None:
        super().__init__()
        self.levels = config.levels
        self.low_pass = LowPass(config)
        self.gates = BandGates(width, config.levels + 1)
        self.out = ResidualLinear(width, width)

    def forward(self, x_BTD: Tensor, context: Context, cache: Cache = None) -> tuple[Tensor, Facts]:
        """Weigh the bands; `cache` keeps the last positions of each level's input."""
        taps_K, facts = self.low_pass()
        inputs_BTD, room_BT = filterable(x_BTD, context), context.document_positions_BT
        bands = decompose(inputs_BTD, taps_K, self.levels, room_BT, cache)
        gates = self.gates(x_BTD).sigmoid().chunk(len(bands), -1)
        y_BTD = torch.zeros_like(x_BTD)
        for gate_BTD, band_BTD in zip(gates, bands, strict=True):
            y_BTD = y_BTD + gate_BTD * band_BTD.to(x_BTD.dtype)
        if cache is None:  # a step of decoding tells nothing
            facts |= measure(inputs_BTD, taps_K, self.levels, room_BT, gates)
            facts |= filter_penalty(self.low_pass, taps_K, context)
        return self.out(y_BTD), facts
