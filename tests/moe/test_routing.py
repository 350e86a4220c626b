"""Top-k, gates and statistics against a loop over tokens."""

import pytest
import torch
from torch import Tensor

from references import leaves, route_loop, top_k_loop
from sra_ds.moe.routing import route
from sra_ds.ops.top_k_routing import Selection, gate_weights, top_k_lowest_id, top_k_routing

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXPERTS = 5
NAN, INF = float("nan"), float("inf")

gates = pytest.mark.parametrize("gate", ["selected", "all", "straight_through"])
top_ks = pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
sizes = pytest.mark.parametrize("tokens", [1, 63, 130])


def scores(tokens: int) -> Tensor:
    return torch.randn(tokens, EXPERTS, dtype=torch.float64)


@sizes
@top_ks
@gates
@pytest.mark.parametrize("padded", [False, True])
def test_everything_and_its_gradient_equal_the_loop(
    tokens: int, top_k: int, gate: str, padded: bool
) -> None:
    value_TE = scores(tokens)
    valid_T = torch.arange(tokens) % 3 != 1 if padded else None
    scores_TE, loop_scores_TE = leaves(value_TE, value_TE)
    routing = route(scores_TE, top_k, gate, valid_T)
    expected = route_loop(loop_scores_TE, top_k, gate, valid_T)
    assert torch.equal(routing.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(routing.load_E, expected.load_E)
    assert routing.valid_count == expected.valid_count
    total, expected_total = value_TE.new_zeros(()), value_TE.new_zeros(())
    for name in ("gates_TK", "mean_probs_E", "lse_T"):
        mine, theirs = getattr(routing, name), getattr(expected, name)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        weights = torch.randn_like(theirs)
        total, expected_total = (
            total + (mine * weights).sum(),
            expected_total + (theirs * weights).sum(),
        )
    total.backward()
    expected_total.backward()
    torch.testing.assert_close(scores_TE.grad, loop_scores_TE.grad, rtol=1e-10, atol=1e-12)


@top_ks
def test_ties_go_to_the_lower_id(top_k: int) -> None:
    scores_TE = torch.randint(0, 3, (130, EXPERTS)).float()
    expected = [top_k_loop(row, top_k) for row in scores_TE.tolist()]
    assert top_k_lowest_id(scores_TE, top_k).tolist() == expected
    assert top_k_lowest_id(torch.zeros(3, EXPERTS), top_k).tolist() == [list(range(top_k))] * 3


def test_nan_is_never_chosen_while_a_number_is_left() -> None:
    scores_TE = torch.tensor(
        [[NAN, 1.0, 2.0, NAN, 0.0], [-5.0, NAN, NAN, NAN, -7.0], [NAN, NAN, -INF, 3.0, INF]]
    )
    assert top_k_lowest_id(scores_TE, 2).tolist() == [[2, 1], [0, 4], [4, 3]]


@pytest.mark.parametrize(
    "row",
    [
        [1.0, -INF, -INF, -INF, -INF],
        [-INF, -INF, -INF, 1.0, -INF],
        [NAN, NAN, 1.0, NAN, NAN],
        [NAN] * 5,
        [INF, INF, -INF, NAN, NAN],
    ],
    ids=str,
)
@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_a_token_never_goes_to_the_same_expert_twice(row: list[float], top_k: int) -> None:
    (ids,) = top_k_lowest_id(torch.tensor([row]), top_k).tolist()
    assert sorted(set(ids)) == sorted(ids)


@sizes
@pytest.mark.parametrize("top_k", [2, EXPERTS])
@gates
def test_gates_of_several_experts_sum_to_one(tokens: int, top_k: int, gate: str) -> None:
    routing = route(scores(tokens), top_k, gate)
    tolerance = 1e-5 if gate == "all" else 1e-14  # `all` divides by the sum + 1e-6
    torch.testing.assert_close(
        routing.gates_TK.sum(-1), torch.ones(tokens).double(), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_single_gate_of_each_form(dtype: torch.dtype) -> None:
    scores_TE = (3 * scores(130)).to(dtype)
    lse_T = scores_TE.logsumexp(-1)
    ids_TK = top_k_lowest_id(scores_TE, 1)
    assert (gate_weights(scores_TE, lse_T, ids_TK, "selected") == 1).all()
    assert (gate_weights(scores_TE, lse_T, ids_TK, "straight_through") == 1).all()
    probs_TK = gate_weights(scores_TE, lse_T, ids_TK, "all")
    torch.testing.assert_close(probs_TK.squeeze(-1), scores_TE.softmax(-1).amax(-1))


@sizes
@top_ks
def test_load_sums_to_k_per_valid_token(tokens: int, top_k: int) -> None:
    valid_T = torch.rand(tokens) < 0.7
    routing = route(scores(tokens), top_k, "all", valid_T)
    assert routing.load_E.sum() == top_k * valid_T.sum()
    assert routing.valid_count == valid_T.sum()


@gates
def test_statistics_are_those_of_the_valid_tokens_alone(gate: str) -> None:
    scores_TE, valid_T = scores(63), torch.rand(63) < 0.5
    padded = route(scores_TE, 2, gate, valid_T)
    alone = route(scores_TE[valid_T], 2, gate)
    assert torch.equal(padded.load_E, alone.load_E)
    torch.testing.assert_close(padded.mean_probs_E, alone.mean_probs_E, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(padded.lse_T[valid_T], alone.lse_T, rtol=0, atol=0)
    assert not padded.lse_T[~valid_T].any()


def test_statistics_without_a_valid_token_are_zero() -> None:
    routing = route(scores(7), 2, "all", torch.zeros(7, dtype=torch.bool))
    assert routing.valid_count == 0
    assert not routing.load_E.any() and not routing.mean_probs_E.any() and not routing.lse_T.any()


def test_padding_gets_no_gradient_from_the_statistics() -> None:
    (scores_TE,) = leaves(scores(63))
    valid_T = torch.arange(63) < 40
    routing = route(scores_TE, 2, "all", valid_T)
    (routing.mean_probs_E.square().sum() + routing.lse_T.square().sum()).backward()
    assert scores_TE.grad is not None
    assert torch.equal(scores_TE.grad.any(-1), valid_T)


def test_selection_decides_who_is_chosen_and_clean_scores_decide_the_gates() -> None:
    scores_TE, selection_TE = scores(63), scores(63)
    bias_E = torch.randn(EXPERTS, dtype=torch.float64)
    noise_TE = selection_TE - scores_TE - bias_E
    routing = top_k_routing(scores_TE, 2, "all", Selection(None, bias_E, noise_TE))
    expected = route_loop(scores_TE, 2, "all", None, selection_TE)
    assert torch.equal(routing.expert_ids_TK, expected.expert_ids_TK)
    torch.testing.assert_close(routing.gates_TK, expected.gates_TK, rtol=1e-12, atol=1e-12)
    clean = route(scores_TE, 2, "all")
    assert not torch.equal(routing.expert_ids_TK, clean.expert_ids_TK)
    assert torch.equal(routing.mean_probs_E, clean.mean_probs_E)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_routed_in_float32(dtype: torch.dtype) -> None:
    routing = route(scores(63).to(dtype), 2, "all")
    assert {routing.gates_TK.dtype, routing.load_E.dtype, routing.lse_T.dtype} == {torch.float32}
    assert routing.mean_probs_E.dtype == torch.float32


def test_large_scores_stay_finite() -> None:
    (scores_TE,) = leaves(1e4 * scores(63).float())
    routing = route(scores_TE, 2, "all")
    (routing.gates_TK.sum() + routing.lse_T.sum() + routing.mean_probs_E[0]).backward()
    assert routing.gates_TK.isfinite().all()
    assert scores_TE.grad is not None and scores_TE.grad.isfinite().all()
