"""DeepSpeed's dropless expert parallelism (AutoEP) with our router for its gate and our experts.

    routing -> sort routes -> all-to-all -> experts held here -> all-to-all back -> combine

The dispatch is DeepSpeed's own; what is replaced is its router, by one that hands over the routing
decided before, and its experts, which have neither biases nor dropout. The engine knows an expert
parameter by the marks set here, and averages its gradient over the processes that hold the same experts.
Written for DeepSpeed 0.19.8; `tests/moe/test_deepspeed_backend.py` says what it relies on.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn

from sra_ds.config.model import MoEChannelConfig
from sra_ds.moe.experts import build_experts
from sra_ds.moe.placement import Placement
from sra_ds.moe.routing import Routing


class DecidedRouter(nn.Module):
    """Stands where AutoEP has its gate: (scores_TK, ids_TK, counts_E) of a routing decided before."""

    routing: Routing | None = None

    def forward(self, x_TD: Tensor, expert_bias: None) -> tuple[Tensor, Tensor, Tensor]:
        """What AutoEP calls; `counts_E` is over all T tokens, padding included, for all are sent."""
        del x_TD, expert_bias
        assert self.routing is not None
        ids_TK = self.routing.expert_ids_TK
        counts_E = torch.bincount(ids_TK.flatten(), minlength=len(self.routing.load_E))
        return self.routing.gates_TK, ids_TK, counts_E.to(torch.int32)


class DeepSpeedBackend(AutoEPMoELayer):  # type: ignore[misc]
    """x_TD, routing -> out_TD, like `LocalBackend`, with the experts of `placement` on this process."""

    def __init__(self, config: MoEChannelConfig, width: int, placement: Placement) -> None:
        with torch.device("meta"):
            super().__init__(
                _layer_spec(config, width), _layer_to_replace(config, width), placement.size,
                placement.rank, AutoEPConfig(enabled=True, autoep_size=placement.size),
            )  # fmt: skip
        self.placement = placement
        self.router = DecidedRouter()
        self.experts = build_experts(config.expert, placement.expert_ids(config.experts), width)
        self._mark_experts()

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Run the routed experts; every route is computed, padding included."""
        self.router.routing = routing
        self.top_k = routing.expert_ids_TK.shape[1]
        try:
            out_1TD: Tensor = super().forward(x_TD.unsqueeze(0))
        finally:
            self.router.routing = None
        return out_1TD.squeeze(0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DeepSpeedBackend":
        """Parameters that are replaced on their way to a device or dtype need their marks again."""
        super()._apply(fn, recurse)
        self.tokens_per_expert.zero_()
        self._mark_experts()
        return self

    def _mark_experts(self) -> None:
        """Expert parameters are averaged over the processes that hold the same experts only."""
        marks = {
            "allreduce": False,
            "group_name": self.ep_group_name,
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": self.ep_group_name,
        }
        for parameter in self.experts.parameters():
            for name, value in marks.items():
                setattr(parameter, name, value)


def _layer_spec(config: MoEChannelConfig, width: int) -> MoELayerSpec:
    """What AutoEP is told of the layer; the gates are applied to the experts' output in float32."""
    return MoELayerSpec(
        moe_module_name="", model_family="sra", router_name="gate", experts_name="experts",
        expert_storage="fused_3d", expert_w1_name="w1", expert_w2_name="w2", expert_w3_name="w3",
        num_experts=config.experts, top_k=config.top_k, hidden_size=width,
        ffn_hidden_size=config.expert.hidden, score_func="softmax", score_apply="post", route_norm=False,
        gate_bias=False, return_router_logits=False, router_logits_capture_target="none",
        router_logits_capture_index=None, router_logits_capture_layer_name=None,
        has_shared_experts=False, shared_experts_name="",
    )  # fmt: skip


def _layer_to_replace(config: MoEChannelConfig, width: int) -> Any:
    """AutoEP takes the weights of a layer it replaces; these have shapes and no values."""
    inward = torch.empty(config.experts, config.expert.hidden, width)
    experts = SimpleNamespace(w1=inward, w2=inward.transpose(1, 2), w3=inward)
    return SimpleNamespace(gate=nn.Linear(width, config.experts, bias=False), experts=experts)
