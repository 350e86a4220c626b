"""Feed-forward networks: one for all tokens, or E of them stacked for grouped products.

Stacked parameters hold one expert per row of their first dimension: `up_weight` E x D x F, `up_bias`
E x F, `down_weight` E x F x D, `down_bias` E x D, and for SwiGLU a `gate_weight` like `up_weight`. With
expert parallelism E is the number of experts held here. Letters: R rows sorted by expert, D width, F
hidden width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import FeedForwardConfig, GeluConfig, SwigluConfig
from sra_ds.layers import Linear, ResidualLinear
from sra_ds.ops.feed_forward import Weights, feed_forward


class GeluFeedForward(nn.Module):
    """down(dropout(gelu(up(x))))."""

    def __init__(self, config: GeluConfig, width: int) -> None:
        super().__init__()
        self.up = Linear(width, config.hidden, bias=config.bias)
        self.down = ResidualLinear(config.hidden, width, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x[..., D] -> [..., D]."""
        hidden = F.gelu(self.up(x), approximate="tanh")
        out: Tensor = self.down(F.dropout(hidden, self.dropout, self.training))
        return out


class SwigluFeedForward(nn.Module):
    """down(dropout(silu(gate(x)) * up(x)))."""

    def __init__(self, config: SwigluConfig, width: int) -> None:
        super().__init__()
        self.gate = Linear(width, config.hidden, bias=False)
        self.up = Linear(width, config.hidden, bias=False)
        self.down = ResidualLinear(config.hidden, width, bias=False)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x[..., D] -> [..., D]."""
        hidden = F.silu(self.gate(x)) * self.up(x)
        out: Tensor = self.down(F.dropout(hidden, self.dropout, self.training))
        return out


class GroupedExperts(nn.Module):
    """E feed-forward networks applied to rows grouped by expert, globally numbered `expert_ids`."""

    def __init__(self, config: FeedForwardConfig, expert_ids: range, width: int) -> None:
        super().__init__()
        bias = isinstance(config, GeluConfig) and config.bias
        experts = len(expert_ids)
        self.expert_ids, self.dropout = expert_ids, config.dropout
        self.up_weight = nn.Parameter(torch.empty(experts, width, config.hidden))
        self.down_weight = nn.Parameter(torch.empty(experts, config.hidden, width))
        self.up_bias = nn.Parameter(torch.empty(experts, config.hidden)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(experts, width)) if bias else None
        self.gate_weight: nn.Parameter | None = None

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert in, rows out; `counts_E` are the rows of each. Rows beyond their sum are
        padding: the last expert computes them, so that no row stays unwritten."""
        offsets_E = counts_E.cumsum(0, dtype=torch.int32)
        offsets_E[-1] = len(x_RD)
        weights = Weights(
            self.gate_weight, self.up_weight, self.up_bias, self.down_weight, self.down_bias
        )
        return feed_forward(x_RD, weights, offsets_E, self.dropout if self.training else 0.0)


class GeluExperts(GroupedExperts):
    """Stacked `GeluFeedForward`."""


class SwigluExperts(GroupedExperts):
    """Stacked `SwigluFeedForward`."""

    def __init__(self, config: FeedForwardConfig, expert_ids: range, width: int) -> None:
        super().__init__(config, expert_ids, width)
        self.gate_weight = nn.Parameter(torch.empty(len(expert_ids), width, config.hidden))


def even_counts(experts: int, rows: int, device: torch.device) -> Tensor:
    """The counts of experts that are given as many rows each. Not by torch.full: torch 2.13 compiles the
    cumulative sum of that to int64, whatever it is asked for."""
    return torch.tensor([rows] * experts, dtype=torch.int32, device=device)


FEED_FORWARDS: dict[type[Any], type[nn.Module]] = {
    GeluConfig: GeluFeedForward,
    SwigluConfig: SwigluFeedForward,
}
EXPERTS: dict[type[Any], type[GroupedExperts]] = {
    GeluConfig: GeluExperts,
    SwigluConfig: SwigluExperts,
}


def build_feed_forward(config: FeedForwardConfig, width: int) -> nn.Module:
    """One feed-forward network."""
    return FEED_FORWARDS[type(config)](config, width)


def build_experts(config: FeedForwardConfig, expert_ids: range, width: int) -> GroupedExperts:
    """Stacked feed-forward networks, one for each number."""
    return EXPERTS[type(config)](config, expert_ids, width)
