"""Causal multi-head attention with rotary positions (RoFormer, arXiv 2104.09864).

Letters: B sequences, T new positions, S visible positions, H heads, C channels per head, D = H*C.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import AttentionConfig, HeadsConfig
from sra_ds.layers import Linear, ResidualLinear
from sra_ds.model.context import Context
from sra_ds.model.facts import Facts
from sra_ds.ops.precision import widest

Angles = tuple[Tensor, Tensor]
"""cos and sin, T x C/2 each."""


class HeadsMixer(nn.Module):
    """What mixers with attention heads share: projections, rotation, cached keys and values."""

    def __init__(self, config: HeadsConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.qkv = Linear(width, 3 * width)
        self.out = ResidualLinear(width, width)

    def project(
        self, x_BTD: Tensor, angles: Angles | None, cache: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q_BHTC, k_BHSC, v_BHSC, with the keys and values of `cache` before the new ones."""
        B, T, D = x_BTD.shape
        heads = self.config.heads
        q, k, v = self.qkv(x_BTD).view(B, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            if "k" in cache:
                k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
            cache["k"], cache["v"] = k, v
        return q, k, v

    def angles(self, context: Context) -> Angles | None:
        """How far each new position turns queries and keys; None where they are not turned."""
        if self.config.rope_theta is None:
            return None
        channels = self.qkv.in_features // self.config.heads
        return rotary_angles(context.positions_T, channels, self.config.rope_theta)

    def merge(self, y_BHTC: Tensor) -> Tensor:
        """The heads' outputs as one y_BTD."""
        merged: Tensor = self.out(y_BHTC.transpose(1, 2).flatten(2))
        return merged


class Attention(HeadsMixer):
    """x_BTD, context -> (y_BTD, facts)."""

    def __init__(self, config: AttentionConfig, width: int) -> None:
        super().__init__(config, width)
        self.dropout = config.dropout

    def forward(
        self, x_BTD: Tensor, context: Context, cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Facts]:
        """Attend within what `context.visible_B1TS` allows; `cache` keeps keys and values."""
        q, k, v = self.project(x_BTD, self.angles(context), cache)
        dropout = self.dropout if self.training else 0.0
        return self.merge(attend(q, k, v, context, dropout)), {}


def attend(
    q_BHTC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, context: Context, dropout: float = 0.0
) -> Tensor:
    """torch's fused attention within what the context allows."""
    return F.scaled_dot_product_attention(
        q_BHTC,
        k_BHSC,
        v_BHSC,
        attn_mask=context.visible_B1TS,
        dropout_p=dropout,
        is_causal=context.visible_B1TS is None,
    )


def rotary_angles(positions_T: Tensor, channels: int, theta: float) -> Angles:
    """cos and sin of position * theta^(-2i/C) in float64, T x C/2."""
    wide = widest(positions_T.device)
    steps = torch.arange(0, channels, 2, dtype=wide, device=positions_T.device)
    angles_TC = positions_T.to(wide)[:, None] * theta ** (-steps / channels)
    return angles_TC.cos(), angles_TC.sin()


def rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + C/2) by the position's angles; the arithmetic is in x's dtype."""
    first, second = x_BHTC.chunk(2, -1)
    cos, sin = cos_TC.to(x_BHTC.dtype), sin_TC.to(x_BHTC.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
