"""Fast weights: a matrix per sequence and head that every token writes and reads by the delta rule.

    S_t = lambda S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        y_t = out(S_t q_t)

with unit q and k and 0 < beta < 1. The state starts anew with each document: from zero, or in a
persistent memory from a state that outlives documents. A forward pass reads that state and never writes
it; a controller does, from the states it returns. `out` starts at zero.

Letters: B sequences, T positions, D width, H heads, C channels of keys and of values.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import FastWeightsConfig, PersistentMemoryConfig
from sra_ds.layers import Linear, ZeroLinear
from sra_ds.model.context import Context
from sra_ds.model.facts import Facts
from sra_ds.ops.delta_rule import delta_rule
from sra_ds.ops.delta_rule_fla import delta_rule_fla
from sra_ds.ops.precision import at_least_float32


class FastMemory(nn.Module):
    """x_BTD, context -> (y_BTD, facts)."""

    start_state_HCC: Tensor | None

    def __init__(self, config: FastWeightsConfig, width: int) -> None:
        super().__init__()
        self.config = config
        inner = config.heads * config.head_width
        self.qkv = Linear(width, 3 * inner, bias=False)
        self.write = Linear(width, config.heads)
        self.decay_logit = nn.Parameter(torch.empty(config.heads))
        self.out = ZeroLinear(inner, width, bias=False)
        self.register_buffer("start_state_HCC", None)

    def forward(
        self, x_BTD: Tensor, context: Context, cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Facts]:
        """`cache` keeps the state after the last position."""
        heads = self.config.heads
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, heads, -1)).unbind(2)
        decay_H = at_least_float32(self.decay_logit).sigmoid()
        rule = delta_rule_fla if self.config.kernel == "fla" and q.is_cuda else delta_rule
        found = rule(
            F.normalize(q, dim=-1),
            F.normalize(k, dim=-1),
            v,
            self.write(x_BTD).sigmoid(),
            decay_H,
            context.starts_BT,
            context.valid_BT,
            state_BHVC=None if cache is None else cache.get("memory_state"),
            start_state_HVC=self.start_state_HCC,
        )
        if cache is not None:
            cache["memory_state"] = found.state_BHVC
        facts: Facts = {
            "memory_decay": decay_H.detach().mean(),
            "memory_state_norm": found.state_BHVC.detach().norm(dim=(-2, -1)).mean(),
        }
        if self.start_state_HCC is not None:
            facts["memory_state"] = found.state_BHVC.detach().mean(0)
        return self.out(found.y_BTHV.flatten(2)), facts


class PersistentMemory(FastMemory):
    """Documents start from `start_state_HCC`, a buffer that forward passes leave alone."""

    start_state_HCC: Tensor

    def __init__(self, config: PersistentMemoryConfig, width: int) -> None:
        super().__init__(config, width)
        self.write_rate = config.write_rate
        shape = (config.heads, config.head_width, config.head_width)
        self.register_buffer("start_state_HCC", torch.zeros(shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PersistentMemory":
        """Casting the model to bf16 leaves the state in float32: what is written is small."""
        state_HCC = self.start_state_HCC
        super()._apply(fn, recurse)
        if self.start_state_HCC.dtype == torch.bfloat16:
            self.start_state_HCC = state_HCC.to(self.start_state_HCC.device)
        return self


@torch.no_grad()
def write_memories(memories: Sequence[PersistentMemory], states_HCC: Sequence[Tensor]) -> None:
    """Move what documents start from towards the states that windows ended in. For controllers only."""
    for memory, state_HCC in zip(memories, states_HCC, strict=True):
        memory.start_state_HCC.lerp_(state_HCC.to(memory.start_state_HCC), memory.write_rate)
