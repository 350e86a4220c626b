"""The backend that defines the result: all experts on this process, grouped products, dropless."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sra_ds.config.model import MoEChannelConfig
from sra_ds.moe.experts import GroupedExperts, build_experts
from sra_ds.moe.placement import Placement
from sra_ds.moe.routing import Routing
from sra_ds.ops.dispatch import DispatchPlan, combine, dispatch, plan_dispatch


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

    def routes(self, x_TD: Tensor, ids_TK: Tensor, ghosts: Sequence[GroupedExperts] = ()) -> Tensor:
        """The output of every route, T x K x D, not yet added up. Ids beyond the experts are those of
        `ghosts`, networks of their own, each of which runs even on no row: so all processes agree on what
        has a gradient."""
        experts = len(self.experts.expert_ids)
        plan = plan_dispatch(ids_TK, experts + len(ghosts))
        x_RD, counts_E = dispatch(x_TD, plan), plan.counts_E[:experts]
        if not ghosts:
            rows_RD = self.experts(x_RD, counts_E)
        else:
            counts = plan.counts_E[experts:].tolist()
            own_RD, *given = x_RD.split([len(x_RD) - sum(counts), *counts])
            found = [self.experts(own_RD, counts_E)]
            for place, (ghost, x_ND) in enumerate(zip(ghosts, given, strict=True), experts):
                found.append(ghost(x_ND, plan.counts_E[place : place + 1]))
            rows_RD = torch.cat(found)
        back = DispatchPlan(plan.inverse_R, plan.order_R, plan.counts_E)
        return dispatch(rows_RD, back).view(*ids_TK.shape, -1)
