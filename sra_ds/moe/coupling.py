"""Couplings: the experts of a token exchange messages before their outputs are added up.

    gnn    h'_i = h_i + gelu(U (V sum_j M_ij h_j + S h_i)),  M_ij = a_ij c_ij / (active - 1),
           a_ij = sigmoid(A_ij),  c_ij = sigmoid(u.h_i + v.h_j + b),  j another active expert
    hgnn   h'_i = h_i + gelu(U V sum_j P_ij h_j),  P = D^-1 H W B^-1 H^T (`sra_ds.ops.hypergraph`)

A map of each token's own outputs, hence causal. U starts at zero: at the start nothing is coupled. Ghosts
are experts like others once they are awake; a hyperedge with a member that sleeps is not there, so that
sleeping ghosts change no bit. Letters: T tokens, K experts per token, E experts and ghosts, the first
`slots` of which are awake, M hyperedges, D width, R rank of the messages.
"""

import math
from bisect import bisect_left
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import GraphCouplingConfig, HypergraphCouplingConfig
from sra_ds.layers import Linear, ZeroLinear
from sra_ds.ops.hypergraph import propagation
from sra_ds.ops.linear import linear
from sra_ds.ops.precision import at_least_float32

UNIT_WEIGHT = math.log(math.e - 1)
"""softplus of it is 1."""


class GraphRound(nn.Module):
    """h_TKD, ids_TK -> h_TKD, by gated messages between each two experts of a token."""

    def __init__(self, config: GraphCouplingConfig, experts: int, width: int) -> None:
        super().__init__()
        self.edge_logit_EE = nn.Parameter(torch.empty(experts, experts))
        self.hears = Linear(width, 1)
        self.speaks = Linear(width, 1, bias=False)
        self.message = Linear(width, config.rank, bias=False)
        self.own = Linear(width, config.rank, bias=False)
        self.out = ZeroLinear(config.rank, width, bias=False)

    def forward(self, h_TKD: Tensor, ids_TK: Tensor, slots: int) -> Tensor:
        """One round; a token's experts are awake, whatever `slots`. All maps read the outputs at once."""
        del slots
        maps = (self.message, self.own, self.hears, self.speaks)
        inward = torch.cat([map_.weight for map_ in maps])
        sizes = [map_.out_features for map_ in maps]
        message_TKR, own_TKR, heard_TK1, spoken_TK1 = linear(h_TKD, inward).split(sizes, -1)
        mix_TKK = self.mix(heard_TK1 + self.hears.bias, spoken_TK1, ids_TK).to(h_TKD.dtype)
        return h_TKD + F.gelu(self.out(mix_TKK @ message_TKR + own_TKR))

    def mix(self, heard_TK1: Tensor, spoken_TK1: Tensor, ids_TK: Tensor) -> Tensor:
        """M: how much expert k of a token hears of each other, in float32 at least."""
        logits_EE = at_least_float32(self.edge_logit_EE)
        edges_TKK = torch.sigmoid(logits_EE[ids_TK.unsqueeze(2), ids_TK.unsqueeze(1)])
        spoken_T1K = at_least_float32(spoken_TK1).transpose(1, 2)
        gates_TKK = torch.sigmoid(at_least_float32(heard_TK1) + spoken_T1K)
        top_k = ids_TK.shape[1]
        others_KK = 1 - torch.eye(top_k, dtype=gates_TKK.dtype, device=ids_TK.device)
        return edges_TKK * gates_TKK * others_KK / max(1, top_k - 1)

    @torch.no_grad()
    def strengths(self, slots: int) -> Tensor:
        """a_ij, how open the edge from expert j to expert i is, of those awake; 0 on the diagonal."""
        awake_SS = self.edge_logit_EE[:slots, :slots]
        return torch.sigmoid(awake_SS.float()).fill_diagonal_(0.0)

    def hyperedges(self, slots: int) -> dict[str, float]:
        """A graph has none."""
        del slots
        return {}


class HypergraphRound(nn.Module):
    """h_TKD, ids_TK -> h_TKD, by messages between the experts of a token that share a hyperedge."""

    incidence_EM: Tensor

    def __init__(self, config: HypergraphCouplingConfig, experts: int, width: int) -> None:
        super().__init__()
        self.config, self.experts = config, experts
        self.sets = config.sets(experts)
        last_members = [own[-1] for own in self.sets]  # rising
        self.awake = [max(1, bisect_left(last_members, slots)) for slots in range(experts + 1)]
        count = len(self.sets) or config.hyperedges
        if config.incidence == "learned":
            self.membership_EM = nn.Parameter(torch.empty(experts, count))
        else:
            incidence_EM = torch.empty(experts, count)
            self.register_buffer("incidence_EM", incidence_EM, persistent=False)
        # the weight of a single hyperedge is divided out again
        self.raw_weight_M = nn.Parameter(torch.empty(count)) if count > 1 else None
        self.asks_MD = nn.Parameter(torch.empty(count, width)) if config.token_gate else None
        self.message = Linear(width, config.rank, bias=False)
        self.out = ZeroLinear(config.rank, width, bias=False)

    def make_incidence(self) -> Tensor:
        """H of fixed sets, on the CPU whatever device models are built on."""
        with torch.device("cpu"):
            incidence_EM = torch.zeros(self.experts, len(self.sets))
            for edge, own in enumerate(self.sets):
                incidence_EM[list(own), edge] = 1.0
        return incidence_EM

    def forward(self, h_TKD: Tensor, ids_TK: Tensor, slots: int) -> Tensor:
        """One round."""
        incidence_SM, weights = self.incidence(slots), self.weights(slots)
        if self.asks_MD is not None:
            weights = weights * self.token_gates(h_TKD, incidence_SM[ids_TK])
        mix_TKK = propagation(incidence_SM, weights, ids_TK).to(h_TKD.dtype)
        return h_TKD + F.gelu(self.out(mix_TKK @ self.message(h_TKD)))

    def incidence(self, slots: int) -> Tensor:
        """H of the experts that are awake: fixed, or the strongest members of each learned set, as open
        as they are."""
        if self.config.incidence != "learned":
            return self.incidence_EM[:slots, : self.count(slots)]
        strength_SM = torch.sigmoid(at_least_float32(self.membership_EM[:slots]))
        chosen = strength_SM.detach().topk(self.config.members, dim=0).indices
        return strength_SM * torch.zeros_like(strength_SM).scatter(0, chosen, 1.0)

    def count(self, slots: int) -> int:
        """Hyperedges all of whose members are awake; one at least, of the members that are."""
        if self.config.incidence == "learned":
            return self.config.hyperedges
        return self.awake[slots]

    def weights(self, slots: int) -> Tensor:
        """w of the hyperedges that are there: positive, 1 at the start."""
        if self.raw_weight_M is None:
            return torch.ones((), device=self.message.weight.device).expand(1)
        return F.softplus(at_least_float32(self.raw_weight_M[: self.count(slots)]))

    def token_gates(self, h_TKD: Tensor, member_TKM: Tensor) -> Tensor:
        """sigmoid(q_m . mean of h over the members of m that are active), T x M."""
        assert self.asks_MD is not None
        said_TKM = at_least_float32(h_TKD @ self.asks_MD[: member_TKM.shape[-1]].T)
        size_TM = member_TKM.sum(1).clamp(min=1e-6)
        return torch.sigmoid((said_TKM * member_TKM).sum(1) / size_TM)

    @torch.no_grad()
    def strengths(self, slots: int) -> Tensor:
        """P with every expert that is awake active, S x S; token gates left out."""
        every = torch.arange(slots, device=self.message.weight.device)
        mix_1SS = propagation(self.incidence(slots), self.weights(slots), every.unsqueeze(0))
        return mix_1SS[0].float()

    @torch.no_grad()
    def hyperedges(self, slots: int) -> dict[str, float]:
        """The weight of each hyperedge by the numbers of its members."""
        incidence_SM = self.incidence(slots)
        names = ["-".join(map(str, own.nonzero().flatten().tolist())) for own in incidence_SM.T]
        found = dict.fromkeys(names, 0.0)
        for name, weight in zip(names, self.weights(slots).tolist(), strict=True):
            found[name] += weight  # learned sets may coincide
        return found


ROUNDS: dict[type[Any], type[nn.Module]] = {
    GraphCouplingConfig: GraphRound,
    HypergraphCouplingConfig: HypergraphRound,
}


class Coupling(nn.Module):
    """h_TKD, ids_TK, slots -> h_TKD, round after round."""

    def __init__(
        self, config: GraphCouplingConfig | HypergraphCouplingConfig, experts: int, width: int
    ) -> None:
        super().__init__()
        made = ROUNDS[type(config)]
        self.rounds = nn.ModuleList(made(config, experts, width) for _ in range(config.rounds))

    def maps(self) -> list[nn.Parameter]:
        """What is multiplied with the output of each expert of a token."""
        tables = ("edge_logit_EE", "membership_EM")
        return [
            p for name, p in self.named_parameters() if p.dim() == 2 and not name.endswith(tables)
        ]

    def forward(self, h_TKD: Tensor, ids_TK: Tensor, slots: int) -> Tensor:
        """Outputs of each token's experts, coupled; `slots` experts are awake."""
        for each in self.rounds:
            h_TKD = each(h_TKD, ids_TK, slots)
        return h_TKD


def build_coupling(config: Any, experts: int, width: int) -> Coupling | None:
    """The coupling a recipe names; None for none."""
    return Coupling(config, experts, width) if type(config) in ROUNDS else None
