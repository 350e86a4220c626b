"""The backend that defines the result: all experts on this process, grouped products, dropless."""

from torch import Tensor, nn

from sra_ds.config.model import MoEChannelConfig
from sra_ds.moe.experts import build_experts
from sra_ds.moe.placement import Placement
from sra_ds.moe.routing import Routing
from sra_ds.ops.dispatch import combine, dispatch, plan_dispatch


class LocalBackend(nn.Module):
    """x_TD, routing -> out_TD[t] = sum_k gate[t, k] * expert[id[t, k]](x[t])."""

    def __init__(self, config: MoEChannelConfig, width: int, placement: Placement) -> None:
        super().__init__()
        self.placement = placement
        self.experts = build_experts(config.expert, placement.expert_ids(config.experts), width)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Run the routed experts; every route is computed, padding included."""
        plan = plan_dispatch(routing.expert_ids_TK, len(self.experts.expert_ids))
        rows_RD = self.experts(dispatch(x_TD, plan), plan.counts_E)
        return combine(rows_RD, routing.gates_TK, plan)
