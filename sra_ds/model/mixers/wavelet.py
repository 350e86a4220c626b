"""Mixers on the bands of a causal wavelet transform without decimation (a trous; Shensa 1992).

    a_0 = x     a_j[t] = sum_k h_k a_{j-1}[t - 2^{j-1} k]     d_j = a_{j-1} - a_j     j = 1 .. J

with zeros before a document's start. The J + 1 bands d_1 .. d_J, a_J add up to x exactly, and the
coarsest sees (K - 1)(2^J - 1) positions back. Filters of libraries extend signals by mirroring or
wrapping, and public code of this idea splits a Fourier transform of the whole window: both read later
positions.

    wave_conv   y = out(sum_b sigmoid(W_b x) * b),     gates 1 / (J + 1) at the start
    wave_attn   heads are dealt to the bands; queries from x, keys and values filtered to the band,
                y = out(concat_b (J + 1) softmax(W x)_b attention_b); of d_j with j > 1 and of a_J, keys
                are those 2^j apart from the start of the document

A linear map of channels commutes with a filter over positions: keys and values are projected first, and
each is filtered for its own band only. Bands need no rotation; keys are rotated at their own positions.

Letters: B sequences, T new positions, S >= T positions, D width, H heads, G heads of a band, C channels
of a head, J levels, K taps, M keys that are kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sra_ds.config.model import WaveAttentionConfig, WaveConvConfig
from sra_ds.model.context import Context
from sra_ds.model.facts import Facts, sum_over_valid
from sra_ds.model.mixers.attention import HeadsMixer, attend, rotate
from sra_ds.model.mixers.filters import LowPass, orthogonality_error
from sra_ds.model.mixers.past import filterable, with_past
from sra_ds.moe.experts import ResidualLinear
from sra_ds.ops.causal_filter import causal_filter
from sra_ds.ops.precision import at_least_float32

Cache = dict[str, Tensor] | None
MEASURED_TOKENS = 512
"""Tokens that the energy of bands is measured on."""


class BandGates(nn.Linear):
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


class WaveAttention(HeadsMixer):
    """x_BTD, context -> (y_BTD, facts)."""

    def __init__(self, config: WaveAttentionConfig, width: int) -> None:
        super().__init__(config, width)
        self.levels, self.dropout = config.levels, config.dropout
        self.low_pass = LowPass(config)
        self.band_gates = nn.Linear(width, config.levels + 1)

    def forward(self, x_BTD: Tensor, context: Context, cache: Cache = None) -> tuple[Tensor, Facts]:
        """Attend to each band; `cache` keeps its keys and values and what the filters still need."""
        taps_K, facts = self.low_pass()
        room_BT = context.document_positions_BT
        queries, keys, values = self.project_bands(x_BTD, taps_K, context, cache)
        room_BS = with_past(cache, "room", room_BT, 2**62)
        logits_BTJ = at_least_float32(self.band_gates(x_BTD))
        gates = (len(queries) * logits_BTJ.softmax(-1)).to(x_BTD.dtype).unbind(-1)
        dropout = self.dropout if self.training else 0.0
        found = []
        for band, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
            kept = keep_every(stride(band, self.levels), k, v, room_BS, context)
            found.append(attend(q, *kept, dropout) * gates[band][:, None, :, None])
        if cache is None:  # a step of decoding tells nothing
            inputs_BTD = filterable(x_BTD, context)
            facts |= measure(inputs_BTD, taps_K, self.levels, room_BT, gates)
            facts |= filter_penalty(self.low_pass, taps_K, context)
        return self.merge(torch.cat(found, 1)), facts

    def project_bands(
        self, x_BTD: Tensor, taps_K: Tensor, context: Context, cache: Cache
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """q_BGTC, k_BGSC and v_BGSC of each band, finest first."""
        B, T, D = x_BTD.shape
        heads, bands = self.config.heads, self.levels + 1
        q_BTHC, *kv = self.qkv(x_BTD).view(B, T, 3, heads, D // heads).unbind(2)
        # channels of one band side by side, keys before values, so that one filter serves both
        both = torch.stack(kv, 2).view(B, T, 2, bands, -1).transpose(2, 3).flatten(2)
        parts = split_bands(
            filterable(both, context), taps_K, self.levels, context.document_positions_BT, cache
        )
        angles = self.angles(context)
        queries, keys, values = [], [], []
        for band, (q, part) in enumerate(
            zip(q_BTHC.transpose(1, 2).chunk(bands, 1), parts, strict=True)
        ):
            k, v = part.to(x_BTD.dtype).view(B, T, 2, heads // bands, -1).permute(2, 0, 3, 1, 4)
            if angles is not None:
                q, k = rotate(q, *angles), rotate(k, *angles)
            queries.append(q)
            keys.append(_join(cache, f"k{band}", k))
            values.append(_join(cache, f"v{band}", v))
        return queries, keys, values


def decompose(
    x_BTD: Tensor, taps_K: Tensor, levels: int, room_BT: Tensor, cache: Cache = None
) -> list[Tensor]:
    """d_1 .. d_J, a_J of the same size as x, which they add up to."""
    bands = []
    for level in range(levels):
        x_BSD = with_past(cache, f"level{level}", x_BTD, (len(taps_K) - 1) * 2**level)
        coarser_BTD = causal_filter(x_BSD, taps_K, 2**level, room_BT)
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
        x_BSD = with_past(cache, f"level{level}", x_BTD, (len(taps_K) - 1) * 2**level)
        coarser_BTD = causal_filter(x_BSD, taps_K, 2**level, room_BT)
        parts.append(x_BTD[..., :size] - coarser_BTD[..., :size])
        x_BTD = coarser_BTD[..., size:]
    return [*parts, x_BTD]


def stride(band: int, levels: int) -> int:
    """Distance of the keys that a band keeps: 1 for d_1, 2^j for d_j and a_j."""
    return 1 if band == 0 else 2 ** min(band + 1, levels)


class Kept(NamedTuple):
    """Keys and values that are attended to, and what may be seen of them."""

    k_BGMC: Tensor
    v_BGMC: Tensor
    context: Context


def keep_every(
    step: int, k_BGSC: Tensor, v_BGSC: Tensor, room_BS: Tensor, context: Context
) -> Kept:
    """Those at multiples of `step` from the start of their document, the same wherever it starts in the
    window. Compiled, or where all are kept, the others are masked and not left out."""
    if step == 1:
        return Kept(k_BGSC, v_BGSC, context)
    kept_BS = room_BS % step == 0
    visible = context.visible_B1TS
    if visible is None:
        T = k_BGSC.shape[2]
        visible = torch.ones(T, T, dtype=torch.bool, device=k_BGSC.device).tril()[None, None]
    if not torch.compiler.is_compiling():
        most = int(kept_BS.sum(1).max())
        chosen_BM = kept_BS.byte().argsort(dim=-1, descending=True, stable=True)[:, :most]
        kept_BS = kept_BS.gather(1, chosen_BM)
        k_BGSC, v_BGSC = _pick(k_BGSC, chosen_BM), _pick(v_BGSC, chosen_BM)
        columns = chosen_BM[:, None, None, :].expand(-1, 1, visible.shape[2], -1)
        visible = visible.expand(len(kept_BS), -1, -1, -1).gather(3, columns)
    visible = visible & kept_BS[:, None, None, :]
    # padding, which may see no key at all, sees every one: nobody looks at what it finds
    visible = visible | ~visible.any(-1, keepdim=True)
    return Kept(k_BGSC, v_BGSC, context._replace(visible_B1TS=visible))


def _pick(x_BGSC: Tensor, index_BM: Tensor) -> Tensor:
    _, G, _, C = x_BGSC.shape
    return x_BGSC.gather(2, index_BM[:, None, :, None].expand(-1, G, -1, C))


def _join(cache: Cache, name: str, x_BGTC: Tensor) -> Tensor:
    """All positions so far."""
    if cache is None:
        return x_BGTC
    cache[name] = torch.cat([cache[name], x_BGTC], 2) if name in cache else x_BGTC
    return cache[name]


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
