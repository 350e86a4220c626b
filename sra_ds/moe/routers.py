"""Routers: (x_TD, valid_T, token_ids_T) -> Routing. The cosine router is what this project is about.

    cosine   s = tau * cos(x, anchor_e)      anchors and temperature learned (SRA)
    linear   s = W x (+ b)                   the usual router
    random   cosine with frozen anchors      control: is learning the anchors worth anything?
    hash     a fixed hash of the token id    control: is looking at the context worth anything?

A router holds no history: `top_k`, the fixed temperature and the selection bias are set by controllers,
and a forward pass changes nothing.
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
from sra_ds.ops.cosine_route import cosine_route, normalized
from sra_ds.ops.precision import at_least_float32
from sra_ds.ops.top_k_routing import Selection, statistics, top_k_routing


class ScoringRouter(nn.Module):
    """What routers with scores share: noise and bias on the selection, arithmetic outside of autocast."""

    selection_bias_E: Tensor

    def __init__(self, config: RouterConfig, experts: int, top_k: int) -> None:
        super().__init__()
        self.config, self.experts, self.top_k = config, experts, top_k
        self.register_buffer("selection_bias_E", torch.zeros(experts))

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
            selection = Selection(valid_T, self.selection_bias_E, self.noise(x_TD))
            return self.route(x_TD, selection, keep_scores)

    def route(self, x_TD: Tensor, selection: Selection, keep_scores: bool) -> Routing:
        """Score and choose, outside of autocast."""
        raise NotImplementedError

    def noise(self, x_TD: Tensor) -> Tensor | None:
        """What is added to the scores while training, for the choice alone."""
        if not self.training or self.config.noise == 0:
            return None
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        shape = (len(x_TD), self.experts)
        return self.config.noise * torch.randn(shape, dtype=dtype, device=x_TD.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScoringRouter":
        """Casting the model to bf16 leaves the selection bias in float32: its steps are small."""
        bias_E = self.selection_bias_E
        super()._apply(fn, recurse)
        if self.selection_bias_E.dtype != bias_E.dtype:
            self.selection_bias_E = bias_E.to(self.selection_bias_E.device)
        return self


class CosineRouter(ScoringRouter):
    """s_e = tau * x.a_e / (|x| |a_e|), with a learned, fixed or absent temperature tau."""

    def __init__(self, config: CosineRouterConfig, width: int, experts: int, top_k: int) -> None:
        super().__init__(config, experts, top_k)
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

    def __init__(self, config: RandomRouterConfig, width: int, experts: int, top_k: int) -> None:
        super().__init__(config, experts, top_k)
        self.register_buffer("anchors", torch.empty(experts, width))
        self.register_buffer("temperature", torch.full((1,), config.temperature))

    def route(self, x_TD: Tensor, selection: Selection, keep_scores: bool) -> Routing:
        return route_by_anchors(self, x_TD, selection, keep_scores)


class LinearRouter(ScoringRouter):
    """s = W x (+ b)."""

    def __init__(self, config: LinearRouterConfig, width: int, experts: int, top_k: int) -> None:
        super().__init__(config, experts, top_k)
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.bias = nn.Parameter(torch.empty(experts)) if config.bias else None

    def route(self, x_TD: Tensor, selection: Selection, keep_scores: bool) -> Routing:
        x_TD = at_least_float32(x_TD)
        bias = None if self.bias is None else self.bias.to(x_TD.dtype)
        scores_TE = F.linear(x_TD, self.weight.to(x_TD.dtype), bias)
        routing = top_k_routing(scores_TE, self.top_k, self.config.gate, selection)
        return Routing(*routing, scores_TE=scores_TE if keep_scores else None)


class HashRouter(nn.Module):
    """k experts by a fixed integer hash of (token id, expert); gates are 1/k."""

    def __init__(self, config: HashRouterConfig, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        del config, width
        self.experts, self.top_k = experts, top_k

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


def build_router(config: AnyRouterConfig, width: int, experts: int, top_k: int) -> nn.Module:
    """The router a recipe names."""
    return ROUTERS[type(config)](config, width, experts, top_k)


def anchor_rows(router: nn.Module) -> Tensor | None:
    """A router's row for each expert, E x D: its anchors, or the rows of a linear map, which stand for
    them; None for a router without any."""
    if isinstance(router, (CosineRouter, RandomRouter)):
        return router.anchors
    return router.weight if isinstance(router, LinearRouter) else None


def route_by_anchors(
    router: CosineRouter | RandomRouter, x_TD: Tensor, selection: Selection, keep_scores: bool
) -> Routing:
    """`cosine_route` with a router's anchors, and the anchors' own cosines."""
    anchors_ED, temperature = router.anchors, router.temperature
    routing, scores_TE = cosine_route(
        x_TD, anchors_ED, temperature, router.top_k, router.config.gate, selection, keep_scores
    )
    unit_ED = normalized(anchors_ED, torch.promote_types(x_TD.dtype, torch.float32))
    mean = temperature.detach().to(unit_ED.dtype).abs().mean()
    return Routing(*routing, mean, unit_ED @ unit_ED.T, scores_TE)


def _mix(x: Tensor) -> Tensor:
    """A bijective 31-bit integer mix (xorshift-multiply), without overflow in int64."""
    mask = 0x7FFFFFFF
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & mask
    x = (x ^ (x >> 12)) * 0x297A2D39 & mask
    return x ^ (x >> 15)
