"""The routed layer: router -> backend (dispatch, experts, combine) (+ shared expert)."""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sra_ds.config.model import MoEChannelConfig
from sra_ds.moe.backends.local import LocalBackend
from sra_ds.moe.experts import build_feed_forward
from sra_ds.moe.routers import build_router
from sra_ds.moe.routing import Routing

BACKENDS: dict[str, type[nn.Module]] = {"local": LocalBackend}


class MoELayer(nn.Module):
    """x_TD -> (out_TD, Routing)."""

    def __init__(self, config: MoEChannelConfig, width: int) -> None:
        super().__init__()
        self.router = build_router(config.router, width, config.experts, config.top_k)
        self.backend = BACKENDS[config.backend](config, width)
        shared = config.shared_expert
        self.shared_expert = None if shared is None else build_feed_forward(shared, width)

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
