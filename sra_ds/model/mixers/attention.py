"""Causal multi-head attention with rotary positions (RoFormer, arXiv 2104.09864).

Letters: B sequences, T new positions, S visible positions, H heads, C channels per head, D = H*C.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import AttentionConfig
from sra_ds.model.context import Context
from sra_ds.moe.experts import ResidualLinear


class Attention(nn.Module):
    """x_BTD, context -> (y_BTD, facts)."""

    def __init__(self, config: AttentionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(width, 3 * width)
        self.out = ResidualLinear(width, width)

    def forward(
        self, x_BTD: Tensor, context: Context, cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend within what `context.visible_B1TS` allows; `cache` keeps keys and values."""
        B, T, D = x_BTD.shape
        heads = self.config.heads
        q, k, v = self.qkv(x_BTD).view(B, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        cos_TC, sin_TC = rotary_angles(context.positions_T, D // heads, self.config.rope_theta)
        q, k = rotate(q, cos_TC, sin_TC), rotate(k, cos_TC, sin_TC)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
            cache["k"], cache["v"] = k, v
        y_BHTC = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=context.visible_B1TS,
            dropout_p=self.config.dropout if self.training else 0.0,
            is_causal=context.visible_B1TS is None,
        )
        return self.out(y_BHTC.transpose(1, 2).reshape(B, T, D)), {}


def rotary_angles(positions_T: Tensor, channels: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/C) in float64, T x C/2."""
    steps = torch.arange(0, channels, 2, dtype=torch.float64, device=positions_T.device)
    angles_TC = positions_T.to(torch.float64)[:, None] * theta ** (-steps / channels)
    return angles_TC.cos(), angles_TC.sin()


def rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + C/2) by the position's angles; the arithmetic is in x's dtype."""
    first, second = x_BHTC.chunk(2, -1)
    cos, sin = cos_TC.to(x_BHTC.dtype), sin_TC.to(x_BHTC.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
