"""A causal wavelet transform without decimation (a trous; Shensa 1992), and what is told of its bands.

    a_0 = x     a_j[t] = sum_k h_k a_{j-1}[t - 2^{j-1} k]     d_j = a_{j-1} - a_j     j = 1 .. J

with zeros before a document's start. The J + 1 bands d_1 .. d_J, a_J add up to x exactly, and the
coarsest sees (K - 1)(2^J - 1) positions back. Filters of libraries extend signals by mirroring or
wrapping, and public code of this idea splits a Fourier transform of the whole window: both read later
positions.

Letters: B sequences, T new positions, S >= T positions, D channels, J levels, K taps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sra_ds.model.context import Context
from sra_ds.model.facts import Facts, sum_over_valid
from sra_ds.model.mixers.filters import LowPass, orthogonality_error
from sra_ds.model.mixers.past import Cache, with_past
from sra_ds.ops.causal_filter import causal_filter
from sra_ds.ops.precision import at_least_float32

MEASURED_TOKENS = 512
"""Tokens that the energy of bands is measured on."""


def decompose(
    x_BTD: Tensor, taps_K: Tensor, levels: int, room_BT: Tensor, cache: Cache = None
) -> list[Tensor]:
    """d_1 .. d_J, a_J of the same size as x, which they add up to."""
    bands = []
    for level in range(levels):
        coarser_BTD = _coarser(x_BTD, taps_K, level, room_BT, cache)
        bands.append(x_BTD - coarser_BTD)
        x_BTD = coarser_BTD
    return [*bands, x_BTD]


def split_bands(
    x_BTD: Tensor, taps_K: Tensor, levels: int, room_BT: Tensor, cache: Cache = None
) -> list[Tensor]:
    """The first of J + 1 equal groups of channels as its d_1, the second as its d_2, ..., the last as its
    a_J; each level filters the groups that are left."""
    size = x_BTD.shape[-1] // (levels + 1)
    parts = []
    for level in range(levels):
        coarser_BTD = _coarser(x_BTD, taps_K, level, room_BT, cache)
        parts.append(x_BTD[..., :size] - coarser_BTD[..., :size])
        x_BTD = coarser_BTD[..., size:]
    return [*parts, x_BTD]


def _coarser(x_BTD: Tensor, taps_K: Tensor, level: int, room_BT: Tensor, cache: Cache) -> Tensor:
    """a_{level + 1} of a_level; `cache` keeps what the filter still needs."""
    x_BSD = with_past(cache, f"level{level}", x_BTD, (len(taps_K) - 1) * 2**level)
    return causal_filter(x_BSD, taps_K, 2**level, room_BT)


@torch.no_grad()
def measure(
    x_BTD: Tensor, taps_K: Tensor, levels: int, room_BT: Tensor, gates: Sequence[Tensor]
) -> Facts:
    """Each band's share of the energy of all bands of the first windows, and its mean gate."""
    rows = slice(-(-MEASURED_TOKENS // x_BTD.shape[1]))
    bands = decompose(x_BTD[rows], taps_K, levels, room_BT[rows])
    energies = torch.stack([band_BTD.square().mean() for band_BTD in bands])
    means = [at_least_float32(gate).mean() for gate in gates]
    return {
        **_by_band("energy", list(energies / energies.sum().clamp(min=1e-30))),
        **_by_band("gate", means),
    }


def filter_penalty(low_pass: LowPass, taps_K: Tensor, context: Context) -> Facts:
    """What `losses.wavelet_weight` weighs: how far learned taps are from orthogonal, per real token."""
    if low_pass.learned_K is None:
        return {}
    error_BT = orthogonality_error(taps_K).expand(context.ids_BT.shape)
    return {"penalties": {"wavelet": sum_over_valid(error_BT, context.valid_BT)}}


def _by_band(name: str, values: list[Tensor]) -> Facts:
    """Named d1 .. dJ, aJ."""
    levels = len(values) - 1
    names = [*(f"d{level}" for level in range(1, levels + 1)), f"a{levels}"]
    return {f"{name}_{band}": value for band, value in zip(names, values, strict=True)}
