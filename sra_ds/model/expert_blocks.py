"""Experts that are transformer blocks: attention, then a feed-forward network, all run on every token.

    r_e = x + attention_e(x),    output_e = (r_e - x) + feed_forward_e(norm_e(r_e))

x is normed already, so that an expert's attention needs no norm of its own. The attentions of all experts
are one product and one call of the fused attention with E x H heads. This is the dense form of the
published graph MoE; it costs E blocks for each layer. Letters: B sequences, T new positions, S visible
ones, E experts, H heads, C channels per head, D = H*C, N = B*T tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from sra_ds.config.model import MoEChannelConfig
from sra_ds.model.context import Context
from sra_ds.model.mixers.attention import attend, rotary_angles, rotate
from sra_ds.moe.experts import build_experts, even_counts
from sra_ds.moe.placement import WHOLE

THETA = 10_000.0


class StackedBlocks(nn.Module):
    """x_BTD, context -> outputs_NED. Every parameter holds one expert per row of its first dimension."""

    def __init__(self, config: MoEChannelConfig, width: int) -> None:
        super().__init__()
        experts, self.heads = config.experts, config.expert_heads
        self.expert_ids = range(experts)
        self.qkv_weight = nn.Parameter(torch.empty(experts, width, 3 * width))
        self.qkv_bias = nn.Parameter(torch.empty(experts, 3 * width))
        self.out_weight = nn.Parameter(torch.empty(experts, width, width))
        self.out_bias = nn.Parameter(torch.empty(experts, width))
        self.norm_scale = nn.Parameter(torch.empty(experts, width))
        self.norm_bias = nn.Parameter(torch.empty(experts, width))
        self.feed_forward = build_experts(config.expert, self.expert_ids, width)

    def forward(
        self, x_BTD: Tensor, context: Context, cache: dict[str, Tensor] | None = None
    ) -> Tensor:
        """`cache` keeps keys and values of all experts."""
        update_END = self.attention(x_BTD, context, cache)
        width, tokens = x_BTD.shape[-1], update_END.shape[1]
        normed_END = layer_norm(x_BTD.reshape(1, -1, width) + update_END, (width,))
        normed_END = normed_END * self.norm_scale.unsqueeze(1) + self.norm_bias.unsqueeze(1)
        counts_E = even_counts(len(self.expert_ids), tokens, x_BTD.device)
        rows_RD: Tensor = self.feed_forward(normed_END.flatten(0, 1).to(x_BTD.dtype), counts_E)
        return (update_END + rows_RD.view_as(update_END)).transpose(0, 1)

    def attention(self, x_BTD: Tensor, context: Context, cache: dict[str, Tensor] | None) -> Tensor:
        """What each expert's attention adds, E x N x D."""
        B, T, D = x_BTD.shape
        E, H = len(self.expert_ids), self.heads
        qkv_ENF = torch.baddbmm(
            self.qkv_bias.unsqueeze(1),
            x_BTD.reshape(1, B * T, D).expand(E, -1, -1),
            self.qkv_weight,
        )
        q, k, v = (
            part.permute(1, 0, 3, 2, 4).reshape(B, E * H, T, D // H)
            for part in qkv_ENF.view(E, B, T, 3, H, D // H).unbind(3)
        )
        angles = rotary_angles(context.positions_T, D // H, THETA)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            if "expert_k" in cache:
                k = torch.cat([cache["expert_k"], k], 2)
                v = torch.cat([cache["expert_v"], v], 2)
            cache["expert_k"], cache["expert_v"] = k, v
        y_BHTC = attend(q, k, v, context)
        y_END = y_BHTC.view(B, E, H, T, D // H).permute(1, 0, 3, 2, 4).reshape(E, B * T, D)
        return torch.baddbmm(self.out_bias.unsqueeze(1), y_END, self.out_weight)


class BlockBackend(nn.Module):
    """Holds the experts of a layer under the name that every backend gives them."""

    def __init__(self, config: MoEChannelConfig, width: int) -> None:
        super().__init__()
        self.placement = WHOLE
        self.experts = StackedBlocks(config, width)

    def forward(
        self, x_BTD: Tensor, context: Context, cache: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Outputs of all experts, N x E x D."""
        outputs_NED: Tensor = self.experts(x_BTD, context, cache)
        return outputs_NED
