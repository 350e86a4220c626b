"""Routers: (x_TD, valid_T, token_ids_T) -> Routing. The cosine router is what this project is about.

    cosine   s = tau * cos(x, anchor_e)      anchors and temperature learned (SRA)
    linear   s = W x (+ b)                   the usual router
    random   cosine with frozen anchors      control: is learning the anchors worth anything?
    hash     a fixed hash of the token id    control: is looking at the context worth anything?

A router holds no history: `top_k`, the fixed temperature, the selection bias and how awake ghosts are is
set by controllers, and a forward pass changes nothing. Ghosts are experts whose scores have ln(alpha)
added: chosen never at alpha = 0, as any expert at 1. They wake one after another, so those that can be
chosen are the first `slots`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import (
    AnyRouterConfig,
    CosineRouterConfig,
    HashRouterConfig,
    LinearRouterConfig,
    RandomRouterConfig,
    RouterConfig,
)
from sra_ds.moe.routing import Routing
from sra_ds.ops.cosine_route import cosine_route, cosine_scores, normalized
from sra_ds.ops.linear import linear
from sra_ds.ops.precision import at_least_float32
from sra_ds.ops.top_k_routing import Selection, statistics, top_k_routing

SET_IN_STEPS = ("selection_bias_E", "ghost_alpha_G")
"""Buffers that controllers move by small steps."""


class ScoringRouter(nn.Module):
    """What routers with scores share: noise and bias on the selection, arithmetic outside of autocast."""

    selection_bias_E: Tensor
    ghost_alpha_G: Tensor

    def __init__(
        self, config: RouterConfig, width: int, experts: int, top_k: int, ghosts: int = 0
    ) -> None:
        super().__init__()
        self.config, self.experts, self.top_k = config, experts, top_k
        self.register_buffer("selection_bias_E", torch.zeros(experts))
        self.ghosts = ghosts
        if ghosts:
            self.register_buffer("ghost_alpha_G", torch.zeros(ghosts))
        for ghost in range(ghosts):  # each a parameter: it has an optimizer group with its expert
            self.register_parameter(f"ghost_anchor{ghost}", nn.Parameter(torch.empty(width)))

    @property
    def awake(self) -> int:
        """Ghosts that can be chosen."""
        return int((self.ghost_alpha_G > 0).sum()) if self.ghosts else 0

    @property
    def slots(self) -> int:
        """Experts that can be chosen, awake ghosts behind the others."""
        return self.experts + self.awake

    def ghost_anchor(self, ghost: int) -> nn.Parameter:
        """The row of a ghost, D."""
        anchor: nn.Parameter = getattr(self, f"ghost_anchor{ghost}")
        return anchor

    def with_ghosts(self, rows_ED: Tensor) -> Tensor:
        """The rows of the experts and those of awake ghosts, S x D."""
        anchors = [self.ghost_anchor(ghost).unsqueeze(0) for ghost in range(self.awake)]
        return torch.cat([rows_ED, *anchors]) if anchors else rows_ED

    def bias_S(self) -> Tensor:
        """What is added to the scores for the choice alone; ghosts have none."""
        return (
            F.pad(self.selection_bias_E, (0, self.awake)) if self.ghosts else self.selection_bias_E
        )

    def shift_S(self) -> Tensor | None:
        """What is added to the scores: ln(alpha) of each ghost; None where that is nothing."""
        alpha_A = self.ghost_alpha_G[: self.awake] if self.ghosts else None
        if alpha_A is None or bool((alpha_A == 1).all()):
            return None
        return torch.cat([alpha_A.new_zeros(self.experts), alpha_A.log()])

    def forward(
        self,
        x_TD: Tensor,
        valid_T: Tensor | None = None,
        token_ids_T: Tensor | None = None,
        keep_scores: bool = False,
    ) -> Routing:
        """Route T tokens; `token_ids_T` is for routers that look at it."""
        del token_ids_T
        with torch.autocast(x_TD.device.type, enabled=False):
            selection = Selection(valid_T, self.bias_S(), self.noise(x_TD))
            return self.route(x_TD, selection, keep_scores)

    def route(self, x_TD: Tensor, selection: Selection, keep_scores: bool) -> Routing:
        """Score and choose, outside of autocast."""
        raise NotImplementedError

    def noise(self, x_TD: Tensor) -> Tensor | None:
        """What is added to the scores while training, for the choice alone."""
        if not self.training or self.config.noise == 0:
            return None
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        shape = (len(x_TD), self.slots)
        return self.config.noise * torch.randn(shape, dtype=dtype, device=x_TD.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScoringRouter":
        """Casting the model to bf16 leaves what controllers set in float32: its steps are small."""
        kept = {name: b for name, b in self.named_buffers(recurse=False) if name in SET_IN_STEPS}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if getattr(self, name).dtype != buffer.dtype:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class CosineRouter(ScoringRouter):
    """s_e = tau * x.a_e / (|x| |a_e|), with a learned, fixed or absent temperature tau."""

    def __init__(
        self, config: CosineRouterConfig, width: int, experts: int, top_k: int, ghosts: int = 0
    ) -> None:
        super().__init__(config, width, experts, top_k, ghosts)
        self.config: CosineRouterConfig = config
        self.anchors = nn.Parameter(torch.empty(experts, width))
        entries = experts if config.temperature == "per_expert" else 1
        if config.temperature in ("global", "per_expert"):
            self.temperature = nn.Parameter(torch.full((entries,), config.initial_temperature))
        else:
            fixed = config.initial_temperature if config.temperature == "fixed" else 1.0
            self.register_buffer("temperature", torch.full((1,), fixed))

    def route(self, x_TD: Tensor, selection: Selection, keep_scores: bool) -> Routing:
        return route_by_anchors(self, x_TD, selection, keep_scores)


class RandomRouter(ScoringRouter):
    """Cosine scores against anchors that are never trained."""

    anchors: Tensor
    temperature: Tensor

    def __init__(
        self, config: RandomRouterConfig, width: int, experts: int, top_k: int, ghosts: int = 0
    ) -> None:
        super().__init__(config, width, experts, top_k, ghosts)
        self.register_buffer("anchors", torch.empty(experts, width))
        self.register_buffer("temperature", torch.full((1,), config.temperature))
        for ghost in range(ghosts):
            self.ghost_anchor(ghost).requires_grad_(False)

    def route(self, x_TD: Tensor, selection: Selection, keep_scores: bool) -> Routing:
        return route_by_anchors(self, x_TD, selection, keep_scores)


class LinearRouter(ScoringRouter):
    """s = W x (+ b)."""

    def __init__(
        self, config: LinearRouterConfig, width: int, experts: int, top_k: int, ghosts: int = 0
    ) -> None:
        super().__init__(config, width, experts, top_k, ghosts)
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.bias = nn.Parameter(torch.empty(experts)) if config.bias else None

    def route(self, x_TD: Tensor, selection: Selection, keep_scores: bool) -> Routing:
        x_TD = at_least_float32(x_TD)
        bias = None if self.bias is None else F.pad(self.bias.to(x_TD.dtype), (0, self.awake))
        scores_TE = linear(x_TD, self.with_ghosts(self.weight).to(x_TD.dtype), bias)
        shift_S = self.shift_S()
        scores_TE = scores_TE if shift_S is None else scores_TE + shift_S.to(scores_TE.dtype)
        routing = top_k_routing(scores_TE, self.top_k, self.config.gate, selection)
        return Routing(*routing, scores_TE=scores_TE if keep_scores else None)


class HashRouter(nn.Module):
    """k experts by a fixed integer hash of (token id, expert); gates are 1/k."""

    awake = 0

    def __init__(
        self, config: HashRouterConfig, width: int, experts: int, top_k: int, ghosts: int = 0
    ) -> None:
        super().__init__()
        assert not ghosts  # the recipe refuses them: nothing is scored
        del config, width
        self.experts, self.slots, self.top_k = experts, experts, top_k

    def forward(
        self,
        x_TD: Tensor,
        valid_T: Tensor | None = None,
        token_ids_T: Tensor | None = None,
        keep_scores: bool = False,
    ) -> Routing:
        """Route by token id; the token's vector is not looked at."""
        if token_ids_T is None:
            raise ValueError("the hash router needs token_ids_T")
        every_E = torch.arange(self.experts, device=x_TD.device)
        hashed_TE = _mix(token_ids_T.unsqueeze(-1) * self.experts + every_E)
        ids_TK = hashed_TE.sort(stable=True).indices[:, : self.top_k]
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        shape = hashed_TE.shape
        probs_TE = torch.full(shape, 1 / self.experts, dtype=dtype, device=x_TD.device)
        lse_T = probs_TE.new_full(shape[:1], math.log(self.experts))
        gates_TK = probs_TE.new_full(ids_TK.shape, 1 / self.top_k)
        with torch.autocast(x_TD.device.type, enabled=False):
            routing = Routing(gates_TK, ids_TK, *statistics(probs_TE, ids_TK, lse_T, valid_T))
        return routing._replace(scores_TE=torch.zeros_like(probs_TE) if keep_scores else None)


ROUTERS: dict[type[Any], type[nn.Module]] = {
    CosineRouterConfig: CosineRouter,
    LinearRouterConfig: LinearRouter,
    RandomRouterConfig: RandomRouter,
    HashRouterConfig: HashRouter,
}


def build_router(
    config: AnyRouterConfig, width: int, experts: int, top_k: int, ghosts: int = 0
) -> nn.Module:
    """The router a recipe names."""
    return ROUTERS[type(config)](config, width, experts, top_k, ghosts)


def anchor_rows(router: nn.Module) -> Tensor | None:
    """A router's row for each expert and awake ghost, S x D: its anchors, or the rows of a linear map,
    which stand for them; None for a router without any."""
    if isinstance(router, (CosineRouter, RandomRouter)):
        return router.with_ghosts(router.anchors)
    return router.with_ghosts(router.weight) if isinstance(router, LinearRouter) else None


def route_by_anchors(
    router: CosineRouter | RandomRouter, x_TD: Tensor, selection: Selection, keep_scores: bool
) -> Routing:
    """`cosine_route` with a router's anchors, and the anchors' own cosines. While a ghost is waking the
    scores are shifted, which the operator does not do."""
    anchors_ED, temperature = router.with_ghosts(router.anchors), router.temperature
    top_k, gate, shift_S = router.top_k, router.config.gate, router.shift_S()
    if shift_S is None:
        routing, scores_TE = cosine_route(
            x_TD, anchors_ED, temperature, top_k, gate, selection, keep_scores
        )
    else:
        scores_TE = cosine_scores(x_TD, anchors_ED, temperature)
        scores_TE = scores_TE + shift_S.to(scores_TE.dtype)
        routing = top_k_routing(scores_TE, top_k, gate, selection)
    unit_ED = normalized(anchors_ED, torch.promote_types(x_TD.dtype, torch.float32))
    mean = temperature.detach().to(unit_ED.dtype).abs().mean()
    kept_TE = None if scores_TE is None or not keep_scores else scores_TE.detach()
    return Routing(*routing, mean, unit_ED @ unit_ED.T, kept_TE)


def _mix(x: Tensor) -> Tensor:
    """A bijective 31-bit integer mix (xorshift-multiply), without overflow in int64."""
    mask = 0x7FFFFFFF
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & mask
    x = (x ^ (x >> 12)) * 0x297A2D39 & mask
    return x ^ (x >> 15)
