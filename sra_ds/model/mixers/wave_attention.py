"""Causal attention in which each group of heads sees one band of a wavelet transform.

    y = out(concat_b (J + 1) softmax(W x)_b attention_b(q from x, k and v filtered to b))

A linear map of channels commutes with a filter over positions: keys and values are projected first, and
each is filtered for its own band only. Keys are rotated at their own positions. Of d_j with j > 1 and of
a_J, keys are those 2^j apart from the start of the document.

Letters: B sequences, T new positions, S >= T positions, D width, H heads, G heads of a band, C channels
of a head, J levels, K taps, M keys that are kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sra_ds.config.model import WaveAttentionConfig
from sra_ds.layers import Linear
from sra_ds.model.context import Context
from sra_ds.model.facts import Facts
from sra_ds.model.mixers.attention import HeadsMixer, attend, rotate
from sra_ds.model.mixers.bands import filter_penalty, measure, split_bands
from sra_ds.model.mixers.filters import LowPass
from sra_ds.model.mixers.past import Cache, filterable, with_past
from sra_ds.ops.precision import at_least_float32


class WaveAttention(HeadsMixer):
    """x_BTD, context -> (y_BTD, facts)."""

    def __init__(self, config: WaveAttentionConfig, width: int) -> None:
        super().__init__(config, width)
        self.levels, self.dropout = config.levels, config.dropout
        self.low_pass = LowPass(config)
        self.band_gates = Linear(width, config.levels + 1)

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
    window. In compiled blocks the others are masked and not left out."""
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
