"""Couplings: the experts of a token exchange messages before their outputs are added up.

    gnn    h'_i = h_i + gelu(U (V sum_j M_ij h_j + S h_i)),  M_ij = a_ij c_ij / (active - 1),
           a_ij = sigmoid(A_ij),  c_ij = sigmoid(u.h_i + v.h_j + b),  j another active expert
    hgnn   h'_i = h_i + gelu(U V sum_j P_ij h_j),  P = D^-1 H W B^-1 H^T (`sra_ds.ops.hypergraph`)

A map of each token's own outputs, hence causal. U starts at zero: at the start nothing is coupled. An
expert beyond the coupled ones (a ghost) neither speaks nor hears. Letters: T tokens, K experts per token,
E experts, M hyperedges, D width, R rank of the messages.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import GraphCouplingConfig, HypergraphCouplingConfig
from sra_ds.moe.experts import ZeroLinear
from sra_ds.ops.hypergraph import members, propagation
from sra_ds.ops.precision import at_least_float32

UNIT_WEIGHT = math.log(math.e - 1)
"""softplus of it is 1."""


class GraphRound(nn.Module):
    """h_TKD, ids_TK -> h_TKD, by gated messages between each two experts of a token."""

    def __init__(self, config: GraphCouplingConfig, experts: int, width: int) -> None:
        super().__init__()
        self.experts = experts
        self.edge_logit_EE = nn.Parameter(torch.empty(experts, experts))
        self.hears = nn.Linear(width, 1)
        self.speaks = nn.Linear(width, 1, bias=False)
        self.message = nn.Linear(width, config.rank, bias=False)
        self.own = nn.Linear(width, config.rank, bias=False)
        self.out = ZeroLinear(config.rank, width, bias=False)

    def forward(self, h_TKD: Tensor, ids_TK: Tensor) -> Tensor:
        """One round."""
        active_TK = ids_TK < self.experts
        mix_TKK = self.mix(h_TKD, ids_TK, active_TK).to(h_TKD.dtype)
        heard_TKD = self.out(mix_TKK @ self.message(h_TKD) + self.own(h_TKD))
        return h_TKD + F.gelu(heard_TKD) * active_TK.unsqueeze(-1)

    def mix(self, h_TKD: Tensor, ids_TK: Tensor, active_TK: Tensor) -> Tensor:
        """M: how much expert k of a token hears of each other, in float32 at least."""
        ids_TK = ids_TK.clamp(max=self.experts - 1)
        logits_EE = at_least_float32(self.edge_logit_EE)
        edges_TKK = torch.sigmoid(logits_EE[ids_TK.unsqueeze(2), ids_TK.unsqueeze(1)])
        spoken_T1K = at_least_float32(self.speaks(h_TKD)).transpose(1, 2)
        gates_TKK = torch.sigmoid(at_least_float32(self.hears(h_TKD)) + spoken_T1K)
        both_TKK = active_TK.unsqueeze(2) & active_TK.unsqueeze(1)
        itself = torch.eye(ids_TK.shape[1], dtype=torch.bool, device=ids_TK.device)
        others_T11 = (active_TK.sum(-1) - 1).clamp(min=1).view(-1, 1, 1)
        return edges_TKK * gates_TKK * (both_TKK & ~itself) / others_T11

    @torch.no_grad()
    def strengths(self) -> Tensor:
        """a_ij, how open the edge from expert j to expert i is; E x E, 0 on the diagonal."""
        return torch.sigmoid(self.edge_logit_EE.float()).fill_diagonal_(0.0)

    def hyperedges(self) -> dict[str, float]:
        """A graph has none."""
        return {}


class HypergraphRound(nn.Module):
    """h_TKD, ids_TK -> h_TKD, by messages between the experts of a token that share a hyperedge."""

    incidence_EM: Tensor

    def __init__(self, config: HypergraphCouplingConfig, experts: int, width: int) -> None:
        super().__init__()
        self.config, self.experts = config, experts
        self.sets = config.sets(experts)
        count = len(self.sets) or config.hyperedges
        if config.incidence == "learned":
            self.membership_EM = nn.Parameter(torch.empty(experts, count))
        else:
            incidence_EM = torch.empty(experts, count)
            self.register_buffer("incidence_EM", incidence_EM, persistent=False)
        # the weight of a single hyperedge is divided out again
        self.raw_weight_M = nn.Parameter(torch.empty(count)) if count > 1 else None
        self.asks = nn.Linear(width, count, bias=False) if config.token_gate else None
        self.message = nn.Linear(width, config.rank, bias=False)
        self.out = ZeroLinear(config.rank, width, bias=False)

    def make_incidence(self) -> Tensor:
        """H of fixed sets, on the CPU whatever device models are built on."""
        with torch.device("cpu"):
            incidence_EM = torch.zeros(self.experts, len(self.sets))
            for edge, own in enumerate(self.sets):
                incidence_EM[list(own), edge] = 1.0
        return incidence_EM

    def forward(self, h_TKD: Tensor, ids_TK: Tensor) -> Tensor:
        """One round."""
        incidence_EM = self.incidence()
        weights = self.weights()
        if self.asks is not None:
            weights = weights * self.token_gates(h_TKD, members(incidence_EM, ids_TK))
        mix_TKK = propagation(incidence_EM, weights, ids_TK).to(h_TKD.dtype)
        heard_TKD = self.out(mix_TKK @ self.message(h_TKD))
        active_TK1 = (ids_TK < self.experts).unsqueeze(-1)
        return h_TKD + F.gelu(heard_TKD) * active_TK1

    def incidence(self) -> Tensor:
        """H, E x M: fixed, or of each learned set its strongest members, as open as they are."""
        if self.config.incidence != "learned":
            return self.incidence_EM
        strength_EM = torch.sigmoid(at_least_float32(self.membership_EM))
        chosen = strength_EM.detach().topk(self.config.members, dim=0).indices
        return strength_EM * torch.zeros_like(strength_EM).scatter(0, chosen, 1.0)

    def weights(self) -> Tensor:
        """w, M: positive, 1 at the start."""
        if self.raw_weight_M is None:
            return torch.ones((), device=self.message.weight.device).expand(1)
        return F.softplus(at_least_float32(self.raw_weight_M))

    def token_gates(self, h_TKD: Tensor, member_TKM: Tensor) -> Tensor:
        """sigmoid(q_m . mean of h over the members of m that are active), T x M."""
        assert self.asks is not None
        said_TKM = at_least_float32(self.asks(h_TKD))
        size_TM = member_TKM.sum(1).clamp(min=1e-6)
        return torch.sigmoid((said_TKM * member_TKM).sum(1) / size_TM)

    @torch.no_grad()
    def strengths(self) -> Tensor:
        """P with every expert active, E x E; token gates left out."""
        every = torch.arange(self.experts, device=self.message.weight.device)
        return propagation(self.incidence(), self.weights(), every.unsqueeze(0))[0].float()

    @torch.no_grad()
    def hyperedges(self) -> dict[str, float]:
        """The weight of each hyperedge by the numbers of its members."""
        incidence_EM = self.incidence()
        names = ["-".join(map(str, own.nonzero().flatten().tolist())) for own in incidence_EM.T]
        found = dict.fromkeys(names, 0.0)
        for name, weight in zip(names, self.weights().tolist(), strict=True):
            found[name] += weight  # learned sets may coincide
        return found


ROUNDS: dict[type[Any], type[nn.Module]] = {
    GraphCouplingConfig: GraphRound,
    HypergraphCouplingConfig: HypergraphRound,
}


class Coupling(nn.Module):
    """h_TKD, ids_TK -> h_TKD, round after round."""

    def __init__(
        self, config: GraphCouplingConfig | HypergraphCouplingConfig, experts: int, width: int
    ) -> None:
        super().__init__()
        made = ROUNDS[type(config)]
        self.rounds = nn.ModuleList(made(config, experts, width) for _ in range(config.rounds))

    def forward(self, h_TKD: Tensor, ids_TK: Tensor) -> Tensor:
        """Outputs of each token's experts, coupled."""
        for each in self.rounds:
            h_TKD = each(h_TKD, ids_TK)
        return h_TKD


def build_coupling(config: Any, experts: int, width: int) -> Coupling | None:
    """The coupling a recipe names; None for none."""
    return Coupling(config, experts, width) if type(config) in ROUNDS else None
