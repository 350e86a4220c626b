"""Couplings against loops over tokens and experts; what relabelling, masks and the start do to them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from references import assert_near, gradients, leaves, randomise
from sra_ds.config.model import CouplingConfig, MoEChannelConfig
from sra_ds.model.init import initialise
from sra_ds.moe.coupling import Coupling, GraphRound, HypergraphRound, build_coupling

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EXPERTS, WIDTH = 5, 8
SLOTS = EXPERTS
COUPLINGS: dict[str, dict[str, Any]] = {
    "gnn": {"kind": "gnn", "rank": 3},
    "pairs": {"kind": "hgnn", "rank": 3},
    "triplets": {"kind": "hgnn", "rank": 3, "incidence": "all_triplets", "rounds": 2},
    "all": {"kind": "hgnn", "rank": 3, "incidence": "all"},
    "learned": {"kind": "hgnn", "rank": 3, "incidence": "learned", "hyperedges": 4, "members": 3},
    "gated": {"kind": "hgnn", "rank": 3, "token_gate": True},
    "more-hyperedges": {"kind": "hgnn", "rank": 3, "incidence": "learned", "hyperedges": 12},
}
each = pytest.mark.parametrize("tree", COUPLINGS.values(), ids=COUPLINGS)


class Holder(torch.nn.Module):
    """What `initialise` takes for a model."""

    def __init__(self, coupling: Coupling) -> None:
        super().__init__()
        self.coupling, self.blocks = coupling, [None]


def coupling_of(tree: dict[str, Any], random: bool = True) -> Coupling:
    made = build_coupling(TypeAdapter(CouplingConfig).validate_python(tree), EXPERTS, WIDTH)
    assert made is not None
    initialise(Holder(made), 0)
    if random:
        randomise(made, 0.7)
    return made.double()


def routes(tokens: int = 13, top_k: int = 3, experts: int = EXPERTS) -> tuple[Tensor, Tensor]:
    ids_TK = torch.rand(tokens, experts).argsort(1)[:, :top_k]
    return torch.randn(tokens, top_k, WIDTH, dtype=torch.float64), ids_TK


def graph_loop(round_: GraphRound, h_KD: Tensor, ids: list[int]) -> Tensor:
    """The equations of the module, message by message."""
    active = range(len(ids))
    out = []
    for i in active:
        heard = round_.own(h_KD[i])
        for j in active:
            if j != i:
                a = torch.sigmoid(round_.edge_logit_EE[ids[i], ids[j]])
                c = torch.sigmoid(round_.hears(h_KD[i]) + round_.speaks(h_KD[j]))
                heard = heard + round_.message(a * c * h_KD[j]) / max(1, len(active) - 1)
        out.append(h_KD[i] + F.gelu(round_.out(heard)))
    return torch.stack(out)


def hypergraph_loop(round_: HypergraphRound, h_KD: Tensor, ids: list[int]) -> Tensor:
    """Hyperedge by hyperedge: members' mean, weighed into each member."""
    incidence_EM, weights_M = round_.incidence(SLOTS), round_.weights(SLOTS)
    active = range(len(ids))
    means, weights = {}, {}
    for m in range(incidence_EM.shape[1]):
        own = {k: incidence_EM[ids[k], m] for k in active if incidence_EM[ids[k], m] > 0}
        if own:
            mean_D = sum(share * h_KD[k] for k, share in own.items()) / sum(own.values())
            means[m], weights[m] = mean_D, weights_M[m]
            if round_.asks_MD is not None:
                weights[m] = weights[m] * torch.sigmoid(round_.asks_MD[m] @ mean_D)
    out = []
    for k, expert in enumerate(ids):
        mine = {
            m: incidence_EM[expert, m] * weights[m] for m in means if incidence_EM[expert, m] > 0
        }
        if not mine:
            out.append(h_KD[k])
            continue
        heard_D = sum(w * means[m] for m, w in mine.items()) / sum(mine.values())
        out.append(h_KD[k] + F.gelu(round_.out(round_.message(heard_D))))
    return torch.stack(out)


def coupling_loop(coupling: Coupling, h_TKD: Tensor, ids_TK: Tensor) -> Tensor:
    out = []
    for h_KD, ids in zip(h_TKD, ids_TK.tolist(), strict=True):
        for each_round in coupling.rounds:
            graph = isinstance(each_round, GraphRound)
            h_KD = (graph_loop if graph else hypergraph_loop)(each_round, h_KD, ids)  # type: ignore[operator]
        out.append(h_KD)
    return torch.stack(out)


@each
@pytest.mark.parametrize("tokens, top_k", [(1, 3), (13, 2), (63, 1), (7, 5)])
def test_it_is_the_loop_over_messages(tree: dict[str, Any], tokens: int, top_k: int) -> None:
    coupling = coupling_of(tree)
    h_TKD, ids_TK = routes(tokens, top_k)
    weights = torch.randn_like(h_TKD)
    found = []
    for function in (
        lambda h, ids: coupling(h, ids, SLOTS),
        lambda h, ids: coupling_loop(coupling, h, ids),
    ):
        coupling.zero_grad(set_to_none=True)
        (leaf,) = leaves(h_TKD)
        out_TKD = function(leaf, ids_TK)
        (out_TKD * weights).sum().backward()
        found.append((out_TKD, leaf.grad, gradients(coupling)))
    for actual, expected in zip(found[0][:2], found[1][:2], strict=True):
        assert_near(actual, expected, 1e-10)
    for name, expected in found[1][2].items():
        actual = found[0][2].get(name)
        assert_near(torch.zeros_like(expected) if actual is None else actual, expected, 1e-9)


@each
def test_at_the_start_nothing_is_coupled(tree: dict[str, Any]) -> None:
    h_TKD, ids_TK = routes()
    assert torch.equal(coupling_of(tree, random=False)(h_TKD, ids_TK, SLOTS), h_TKD)


@each
def test_a_token_hears_nothing_of_another(tree: dict[str, Any]) -> None:
    coupling = coupling_of(tree)
    h_TKD, ids_TK = routes(6)
    (leaf,) = leaves(h_TKD)
    for token in range(6):
        out_KD = coupling(leaf, ids_TK, SLOTS)[token]
        (gradient_TKD,) = torch.autograd.grad(out_KD.sin().sum(), leaf)
        reached = gradient_TKD.abs().amax((1, 2)) > 0
        assert reached.tolist() == [other == token for other in range(6)]


@each
def test_the_order_of_a_tokens_experts_does_not_matter(tree: dict[str, Any]) -> None:
    coupling = coupling_of(tree)
    h_TKD, ids_TK = routes()
    order = torch.tensor([2, 0, 1])
    shuffled = coupling(h_TKD[:, order], ids_TK[:, order], SLOTS)
    assert_near(shuffled, coupling(h_TKD, ids_TK, SLOTS)[:, order], 1e-12)


@each
def test_relabelled_experts_give_the_same_outputs(tree: dict[str, Any]) -> None:
    """Expert e becomes new_E[e]; its edges go with it."""
    coupling = coupling_of(tree)
    h_TKD, ids_TK = routes()
    expected = coupling(h_TKD, ids_TK, SLOTS)
    new_E = torch.randperm(EXPERTS)
    old_E = new_E.argsort()
    with torch.no_grad():
        for one in coupling.rounds:
            if isinstance(one, GraphRound):
                one.edge_logit_EE.copy_(one.edge_logit_EE[old_E][:, old_E])
            elif one.config.incidence == "learned":
                one.membership_EM.copy_(one.membership_EM[old_E])
            else:
                one.incidence_EM.copy_(one.incidence_EM[old_E])
    assert_near(coupling(h_TKD, new_E[ids_TK], SLOTS), expected, 1e-12)


@each
@pytest.mark.parametrize("awake", [0, 1, 2])
def test_a_sleeping_ghost_changes_no_bit_and_an_awake_one_is_coupled(
    tree: dict[str, Any], awake: int
) -> None:
    """Two ghosts, some awake: the same as a coupling over those awake that has the same weights."""
    parsed = TypeAdapter(CouplingConfig).validate_python(tree)
    with_ghosts, without = (
        build_coupling(parsed, experts, WIDTH) for experts in (EXPERTS + 2, EXPERTS + awake)
    )
    for made in (with_ghosts, without):
        initialise(Holder(made), 0)
    randomise(with_ghosts, 0.7).double()
    without.double()
    with torch.no_grad():
        for own, given in zip(without.parameters(), with_ghosts.parameters(), strict=True):
            own.copy_(given[tuple(slice(size) for size in own.shape)])
    h_TKD, ids_TK = routes(30, 3, EXPERTS + awake)
    found = with_ghosts(h_TKD, ids_TK, EXPERTS + awake)
    assert torch.equal(found, without(h_TKD, ids_TK, EXPERTS + awake))
    if awake:
        said_TKD = h_TKD + (ids_TK == EXPERTS).unsqueeze(-1)
        others = (ids_TK != EXPERTS).unsqueeze(-1)
        heard = (with_ghosts(said_TKD, ids_TK, EXPERTS + awake) - found) * others
        assert heard.abs().max() > 1e-4


@pytest.mark.parametrize("tree", [COUPLINGS[n] for n in ("pairs", "triplets", "learned", "gated")])
def test_every_hyperedge_weight_has_a_gradient(tree: dict[str, Any]) -> None:
    coupling = coupling_of(tree)
    h_TKD, ids_TK = routes(64)
    coupling(h_TKD, ids_TK, SLOTS).square().sum().backward()
    for one in coupling.rounds:
        assert (one.raw_weight_M.grad.abs() > 1e-9).all()


def test_the_weight_of_the_one_hyperedge_of_all_would_cancel_and_is_not_there() -> None:
    (one,) = coupling_of(COUPLINGS["all"]).rounds
    assert one.raw_weight_M is None and one.hyperedges(SLOTS) == {"0-1-2-3-4": 1.0}


def test_strengths_and_hyperedges_are_told() -> None:
    (pairs,) = coupling_of(COUPLINGS["pairs"], random=False).rounds
    strengths_EE = pairs.strengths(SLOTS)
    assert_near(strengths_EE.sum(1), torch.ones(EXPERTS), 1e-6)
    assert (
        list(pairs.hyperedges(SLOTS))[:3] == ["0-1", "0-2", "1-2"]
        and len(pairs.hyperedges(SLOTS)) == 10
    )
    assert all(abs(weight - 1) < 1e-6 for weight in pairs.hyperedges(SLOTS).values())
    graph = coupling_of(COUPLINGS["gnn"], random=False).rounds[0]
    expected_EE = torch.full((EXPERTS, EXPERTS), 0.11920292).fill_diagonal_(0.0)
    assert_near(graph.strengths(SLOTS), expected_EE, 1e-6)
    learned = coupling_of(COUPLINGS["learned"]).rounds[0]
    assert all(name.count("-") == 2 for name in learned.hyperedges(SLOTS))


@pytest.mark.parametrize(
    "tree, said",
    [
        ({"coupling": "gnn", "backend": "deepspeed"}, "coupling needs the output of every route"),
        ({"compare_outputs": True, "backend": "auto"}, "use backend=local"),
        ({"ghosts": {"count": 1}, "backend": "megablocks"}, "ghosts.count needs the output"),
        ({"expert_kind": "block", "top_k": 4}, "top_k=4 must be experts=64"),
        ({"expert_kind": "block", "top_k": 64, "ghosts": {"count": 1}}, "no place to take"),
        ({"coupling": "hgnn"}, "more than 1024: use incidence=learned"),
        ({"coupling": {"kind": "hgnn", "members": 2}}, "no effect without incidence=learned"),
        ({"ghosts": {"count": 1}, "router": "hash"}, "router with scores"),
        (
            {"ghosts": {"count": 1}, "router": {"kind": "cosine", "temperature": "per_expert"}},
            "one temperature",
        ),
        ({"compare_outputs": True, "top_k": 1}, "top_k of at least 2"),
        ({"expert_heads": 2}, "no effect without expert_kind=block"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_together_is_refused(tree: dict[str, Any], said: str) -> None:
    whole = {"experts": 64, "expert": {"kind": "gelu", "hidden": 16}, **tree}
    with pytest.raises(ValidationError, match=said.replace("(", r"\(")):
        TypeAdapter(MoEChannelConfig).validate_python(whole)
