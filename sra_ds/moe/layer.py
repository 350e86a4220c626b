"""The routed layer: router -> experts -> (coupling) -> sum by the (scaled) gates (+ shared expert).

Two ways through it. Closed: a backend dispatches, runs and combines, and only the sum is known. Opened,
where something has to look at the output of every route (coupling, comparison of outputs, ghosts): the
same experts, their outputs kept apart until the end.
"""

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sra_ds.config.model import MoEChannelConfig
from sra_ds.moe.coupling import build_coupling
from sra_ds.moe.experts import build_experts, build_feed_forward, even_counts
from sra_ds.moe.ghosts import background_error, unexplained
from sra_ds.moe.placement import WHOLE, BackendName, Placement
from sra_ds.moe.routers import build_router
from sra_ds.moe.routing import Routing
from sra_ds.ops.dispatch import combine, plan_of_tokens
from sra_ds.ops.output_overlap import output_overlap
from sra_ds.ops.precision import at_least_float32

BACKENDS: dict[BackendName, str] = {
    "local": "LocalBackend",
    "deepspeed": "DeepSpeedBackend",
    "megablocks": "MegaBlocksBackend",
}
"""Class of each module in `backends/`; imported when used, for what they stand on is heavy."""


def build_backend(config: MoEChannelConfig, width: int, placement: Placement) -> nn.Module:
    """Dispatch, experts and combine as one module, (x_TD, routing) -> out_TD. Its parameters are those
    of `self.experts`, named alike in every backend."""
    module = import_module(f"sra_ds.moe.backends.{placement.backend}")
    backend: nn.Module = getattr(module, BACKENDS[placement.backend])(config, width, placement)
    return backend


class Given(NamedTuple):
    """What a routed layer may be told besides its input."""

    valid_T: Tensor | None = None
    """False marks padding."""
    token_ids_T: Tensor | None = None
    keep_scores: bool = False
    recompute: bool = False
    """Run the experts again in the backward pass, from the stored routing, and never the router."""
    mixed_TD: Tensor | None = None
    """What the block's mixer added before; ghosts are judged by it."""
    outputs_TED: Tensor | None = None
    """Outputs of all experts, where they are made outside of the layer (expert_kind=block)."""


ALONE = Given()


class MoELayer(nn.Module):
    """x_TD -> (out_TD, facts), of which `routing` is the `Routing`."""

    def __init__(
        self, config: MoEChannelConfig, width: int, backend: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config, self.width = config, width
        experts, ghosts = config.experts, config.ghosts.count
        self.router: Any = build_router(config.router, width, experts, config.top_k, ghosts)
        self.backend: Any = build_backend(config, width, WHOLE) if backend is None else backend
        self.coupling = build_coupling(config.coupling, experts + ghosts, width)
        self.ghosts = nn.ModuleList(
            build_experts(config.expert, range(experts + g, experts + g + 1), width)
            for g in range(ghosts)
        )
        self.opened = config.opened
        """Whether outputs of routes are kept apart until the sum."""
        self.overlap_weight = 1.0
        """This layer's share of the orthogonality loss; a controller may move it."""
        shared = config.shared_expert
        self.shared_expert = None if shared is None else build_feed_forward(shared, width)

    def place(self, placement: Placement) -> None:
        """Run the experts elsewhere, before they have values."""
        if placement != self.backend.placement:
            self.backend = build_backend(self.config, self.width, placement)

    def ghost_parameters(self, ghost: int) -> list[nn.Parameter]:
        """Everything of one ghost: its anchor and its network."""
        return [self.router.ghost_anchor(ghost), *self.ghosts[ghost].parameters()]

    def forward(self, x_TD: Tensor, given: Given = ALONE) -> tuple[Tensor, dict[str, Any]]:
        """Route once, run the experts."""
        routing: Routing = self.router(x_TD, given.valid_T, given.token_ids_T, given.keep_scores)
        facts: dict[str, Any] = {}
        summed = scaled(routing, self.config.routed_scale)
        if self.opened:
            out_TD, facts = _run(self._opened, given.recompute, x_TD, summed, given)
        else:
            out_TD = _run(self.backend, given.recompute, x_TD, summed)
        if self.shared_expert is not None:
            out_TD = out_TD + _run(self.shared_expert, given.recompute, x_TD)
        return out_TD, {"routing": routing, **facts}

    def _opened(
        self, x_TD: Tensor, routing: Routing, given: Given
    ) -> tuple[Tensor, dict[str, Any]]:
        """The sum by the gates, and what the outputs of the routes say."""
        ids_TK, rows_TKD = routing.expert_ids_TK, self.routes(x_TD, routing, given)
        coupled_TKD = rows_TKD
        if self.coupling is not None:
            coupled_TKD = self.coupling(rows_TKD, ids_TK, self.router.slots)
        out_TD = combine(coupled_TKD.flatten(0, 1), routing.gates_TK, plan_of_tokens(ids_TK))
        facts: dict[str, Any] = {}
        if self.coupling is not None:
            facts["coupled_share"] = _relative_size(coupled_TKD - rows_TKD, rows_TKD)
        if not self.training:
            return out_TD, facts
        if self.config.compare_outputs or self.ghosts:
            facts |= self._compared(rows_TKD, routing, given)
        if self.ghosts and given.mixed_TD is not None:
            facts |= self._judged(x_TD, out_TD, rows_TKD, given, facts)
        return out_TD, facts

    def routes(self, x_TD: Tensor, routing: Routing, given: Given) -> Tensor:
        """The output of every route, T x K x D."""
        ids_TK = routing.expert_ids_TK
        if given.outputs_TED is not None:
            places_TKD = ids_TK.unsqueeze(-1).expand(-1, -1, x_TD.shape[-1])
            return given.outputs_TED.gather(1, places_TKD)
        awake = list(self.ghosts)[: self.router.awake]
        rows_TKD: Tensor = self.backend.routes(x_TD, ids_TK, awake)
        return rows_TKD

    def _compared(self, rows_TKD: Tensor, routing: Routing, given: Given) -> dict[str, Any]:
        """How alike the outputs of a token's experts are; with gradient where a loss may want it."""
        learns = self.config.compare_outputs
        rows_TKD = rows_TKD if learns else rows_TKD.detach()
        total = output_overlap(rows_TKD, given.valid_T).sum()
        facts: dict[str, Any] = {"overlap": total.detach() / routing.valid_count.clamp(min=1)}
        if learns:
            facts["penalties"] = {"orthogonality": self.overlap_weight * total}
        return facts

    def _judged(
        self,
        x_TD: Tensor,
        out_TD: Tensor,
        rows_TKD: Tensor,
        given: Given,
        facts: dict[str, Any],
    ) -> dict[str, Any]:
        """Saturation, and what the next ghost learns before it wakes."""
        assert given.mixed_TD is not None
        target_TD = (given.mixed_TD + out_TD).detach()
        left = unexplained(target_TD, rows_TKD.detach(), given.valid_T)
        apart = 1 - facts["overlap"] if rows_TKD.shape[1] > 1 else torch.zeros_like(left)
        found: dict[str, Any] = {
            "apartness": apart,
            "unexplained": left,
            "saturation": apart * left,
        }
        found["ghost_alpha"] = self.router.ghost_alpha_G.sum()
        awake = self.router.awake
        if self.config.ghosts.background and awake < len(self.ghosts):
            every_1 = even_counts(1, len(x_TD), x_TD.device)
            guess_TD = self.ghosts[awake](x_TD.detach(), every_1)
            error = background_error(guess_TD, given.mixed_TD, given.valid_T)
            found["penalties"] = {**facts.get("penalties", {}), "ghost": error}
        return found


def scaled(routing: Routing, by: str) -> Routing:
    """`routing` with the gates its outputs are added up by (`MoEChannelConfig.routed_scale`)."""
    top_k = routing.expert_ids_TK.shape[1]
    factor = {"one": 1.0, "sqrt_k": top_k**0.5, "k": float(top_k)}[by]
    return routing if factor == 1 else routing._replace(gates_TK=routing.gates_TK * factor)


def _relative_size(change: Tensor, of: Tensor) -> Tensor:
    share: Tensor = at_least_float32(change.detach()).norm() / at_least_float32(of.detach()).norm()
    return share


def _run(part: Any, recompute: bool, *inputs: Any) -> Any:
    """What a part returns, computed again for the backward pass where that is asked for."""
    return checkpoint(part, *inputs, use_reentrant=False) if recompute else part(*inputs)
