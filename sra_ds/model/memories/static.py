"""A table of slots that changes a low-rank part of the channel's weights, token by token.

    a = softmax over the best slots of tau cos(key(x), K_s)      m = adapter(sum_s a_s V_s)
    y = A (m * (B x)), the product of x with the weight change A diag(m) B

The lookup is the cosine router with slots in the place of experts: slots have anchors, and each token's
best ones can be read. A starts at zero. tau starts at 20: with 1 and a thousand slots the best would get
0.3 % of the weight and the lookup were a constant.

Letters: B sequences, T positions, D width, S slots, K slots a token reads, R rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import CosineRouterConfig, StaticMemoryConfig
from sra_ds.layers import Linear, ZeroLinear
from sra_ds.model.context import Context
from sra_ds.model.facts import Facts, sum_over_valid
from sra_ds.moe.routers import CosineRouter
from sra_ds.moe.routing import Routing
from sra_ds.ops.precision import at_least_float32


class StaticMemory(nn.Module):
    """x_BTD, context -> (y_BTD, facts)."""

    def __init__(self, config: StaticMemoryConfig, width: int) -> None:
        super().__init__()
        self.config = config
        slots = CosineRouterConfig(gate="selected", initial_temperature=config.temperature)
        self.key = Linear(width, config.key_width, bias=False)
        self.router = CosineRouter(slots, config.key_width, config.slots, config.best)
        self.values = nn.Parameter(torch.empty(config.slots, config.value_width))
        self.adapter = Linear(config.value_width, config.rank)
        self.down = Linear(width, config.rank, bias=False)
        self.up = ZeroLinear(config.rank, width, bias=False)

    def forward(
        self, x_BTD: Tensor, context: Context, cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Facts]:
        """Each token on its own."""
        del cache
        valid_BT = context.valid_BT
        valid_N = None if valid_BT is None else valid_BT.flatten()
        routing: Routing = self.router(self.key(x_BTD).flatten(0, 1), valid_N)
        read_NV = F.embedding_bag(
            routing.expert_ids_TK,
            self.values,
            per_sample_weights=routing.gates_TK.to(self.values.dtype),
            mode="sum",
        )
        m_BTR = self.adapter(read_NV).unflatten(0, x_BTD.shape[:2])
        size_BT = at_least_float32(m_BTR).square().sum(-1)
        penalties = {"memory": sum_over_valid(size_BT, valid_BT)}
        facts = {"penalties": penalties, **slot_usage(routing.load_E)}
        return self.up(m_BTR * self.down(x_BTD)), facts


@torch.no_grad()
def slot_usage(load_S: Tensor) -> Facts:
    """Entropy of the slots' shares of all reads over ln S, and the share of slots that nobody read."""
    share_S = load_S / load_S.sum().clamp(min=1)
    entropy = -torch.special.xlogy(share_S, share_S).sum()
    return {
        "slot_entropy": entropy / max(1e-9, math.log(len(load_S))),
        "unread_slots": (load_S == 0).float().mean(),
    }
