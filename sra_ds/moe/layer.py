"""The routed layer: router -> backend (dispatch, experts, combine) (+ shared expert)."""

from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sra_ds.config.model import MoEChannelConfig
from sra_ds.moe.experts import build_feed_forward
from sra_ds.moe.placement import WHOLE, BackendName, Placement
from sra_ds.moe.routers import build_router
from sra_ds.moe.routing import Routing

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


class MoELayer(nn.Module):
    """x_TD -> (out_TD, Routing)."""

    def __init__(self, config: MoEChannelConfig, width: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        self.router = build_router(config.router, width, config.experts, config.top_k)
        self.backend = build_backend(config, width, WHOLE)
        shared = config.shared_expert
        self.shared_expert = None if shared is None else build_feed_forward(shared, width)

    def place(self, placement: Placement) -> None:
        """Run the experts elsewhere, before they have values."""
        self.backend = build_backend(self.config, self.width, placement)

    def forward(
        self,
        x_TD: Tensor,
        valid_T: Tensor | None = None,
        token_ids_T: Tensor | None = None,
        keep_scores: bool = False,
        recompute: bool = False,
    ) -> tuple[Tensor, Routing]:
        """Route once, run the experts; with `recompute` backward runs the experts again from the
        stored routing, and never the router."""
        routing: Routing = self.router(x_TD, valid_T, token_ids_T, keep_scores)
        out_TD = _run(self.backend, recompute, x_TD, routing)
        if self.shared_expert is not None:
            out_TD = out_TD + _run(self.shared_expert, recompute, x_TD)
        return out_TD, routing


def _run(module: nn.Module, recompute: bool, *inputs: Any) -> Tensor:
    if recompute:
        again: Tensor = checkpoint(module, *inputs, use_reentrant=False)
        return again
    out: Tensor = module(*inputs)
    return out
