"""Dispatch and combine against plain indexing."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from references import leaves
from sra_ds.ops.dispatch import (
    combine,
    combine_reference,
    dispatch,
    dispatch_reference,
    plan_dispatch,
    runs_compiled,
)
from sra_ds.ops.extension import extension, use_kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXPERTS, WIDTH = 6, 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

sizes = pytest.mark.parametrize("tokens", [1, 63, 130])
top_ks = pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
loads = pytest.mark.parametrize("load", ["mixed", "one_empty", "all_on_one"])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The compiled operators, and the torch functions that run where they do not."""
    with use_kernels("auto" if request.param == "compiled" else "reference"):
        if request.param == "compiled" and "cpu" not in extension().devices:
            pytest.skip(extension().reason)
        yield request.param


def expert_ids(tokens: int, top_k: int, load: str) -> Tensor:
    if load == "all_on_one":
        return torch.full((tokens, top_k), 3)
    noise_TE = torch.rand(tokens, EXPERTS)
    ids_TK = noise_TE.argsort(-1)[:, :top_k]
    return ids_TK.where(ids_TK != 2, 4) if load == "one_empty" else ids_TK


@sizes
@top_ks
@loads
def test_plan_sorts_every_route_by_expert_and_keeps_their_order(
    tokens: int, top_k: int, load: str
) -> None:
    ids_TK = expert_ids(tokens, top_k, load)
    plan = plan_dispatch(ids_TK, EXPERTS)
    routes = sorted(range(tokens * top_k), key=lambda r: (int(ids_TK.flatten()[r]), r))
    assert plan.order_R.tolist() == routes
    assert plan.order_R[plan.inverse_R].tolist() == list(range(tokens * top_k))
    assert plan.counts_E.tolist() == torch.bincount(ids_TK.flatten(), minlength=EXPERTS).tolist()
    assert plan.counts_E.dtype == torch.int32


@sizes
@top_ks
@loads
@dtypes
def test_dispatch_and_its_gradient_equal_plain_indexing(
    tokens: int, top_k: int, load: str, dtype: torch.dtype
) -> None:
    plan = plan_dispatch(expert_ids(tokens, top_k, load), EXPERTS)
    x_TD, x_reference_TD = leaves(*[torch.randn(tokens, WIDTH, dtype=dtype)] * 2)
    rows_RD, expected_RD = dispatch(x_TD, plan), dispatch_reference(x_reference_TD, plan)
    assert torch.equal(rows_RD, expected_RD)
    weights_RD = torch.randn_like(rows_RD)
    rows_RD.backward(weights_RD)
    expected_RD.backward(weights_RD)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(x_TD.grad, x_reference_TD.grad, rtol=tolerance, atol=tolerance)


@sizes
@top_ks
@loads
@dtypes
def test_combine_and_its_gradients_equal_the_gated_sum(
    tokens: int, top_k: int, load: str, dtype: torch.dtype
) -> None:
    plan = plan_dispatch(expert_ids(tokens, top_k, load), EXPERTS)
    rows = torch.randn(tokens * top_k, WIDTH, dtype=dtype)
    gates = torch.rand(tokens, top_k, dtype=dtype)
    y_RD, gates_TK = leaves(rows, gates)
    y_reference_RD, gates_reference_TK = leaves(rows, gates)
    out_TD = combine(y_RD, gates_TK, plan)
    expected_TD = combine_reference(y_reference_RD, gates_reference_TK, plan)
    weights_TD = torch.randn_like(out_TD)
    out_TD.backward(weights_TD)
    expected_TD.backward(weights_TD)
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(out_TD, expected_TD, **near)
    torch.testing.assert_close(y_RD.grad, y_reference_RD.grad, **near)
    torch.testing.assert_close(gates_TK.grad, gates_reference_TK.grad, **near)


@top_ks
def test_numerical_gradients_of_the_round_trip(top_k: int) -> None:
    plan = plan_dispatch(expert_ids(4, top_k, "mixed"), EXPERTS)
    x_TD, gates_TK = leaves(
        torch.randn(4, 3, dtype=torch.float64), torch.rand(4, top_k, dtype=torch.float64)
    )
    assert torch.autograd.gradcheck(
        lambda x, gates: combine(dispatch(x, plan).tanh(), gates, plan), (x_TD, gates_TK)
    )


@sizes
@top_ks
def test_combine_with_unit_gates_returns_k_times_the_token(tokens: int, top_k: int) -> None:
    plan = plan_dispatch(expert_ids(tokens, top_k, "mixed"), EXPERTS)
    x_TD = torch.randn(tokens, WIDTH, dtype=torch.float64)
    out_TD = combine(dispatch(x_TD, plan), x_TD.new_ones(tokens, top_k), plan)
    torch.testing.assert_close(out_TD, top_k * x_TD, rtol=1e-14, atol=1e-14)


def test_bf16_rows_are_summed_in_float32() -> None:
    plan = plan_dispatch(expert_ids(63, EXPERTS, "mixed"), EXPERTS)
    y_RD = torch.randn(63 * EXPERTS, WIDTH).bfloat16().requires_grad_()
    gates_TK = torch.rand(63, EXPERTS, requires_grad=True)
    out_TD = combine(y_RD, gates_TK, plan)
    exact_TD = combine_reference(y_RD.double(), gates_TK.double(), plan)
    assert out_TD.dtype == torch.bfloat16
    torch.testing.assert_close(out_TD.double(), exact_TD, rtol=2**-8, atol=1e-6)
    out_TD.backward(torch.randn_like(out_TD))
    assert y_RD.grad is not None and y_RD.grad.dtype == torch.bfloat16
    assert gates_TK.grad is not None and gates_TK.grad.dtype == torch.float32
    assert y_RD.grad.isfinite().all() and gates_TK.grad.isfinite().all()


def test_short_numbers_are_rounded_once() -> None:
    for dtype, rounding in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        plan = plan_dispatch(expert_ids(130, 2, "mixed"), EXPERTS)
        (x_TD,) = leaves(torch.randn(130, 300).to(dtype))
        rows_RD = dispatch(x_TD, plan)
        assert torch.equal(rows_RD, dispatch_reference(x_TD, plan))
        weights_RD = torch.randn_like(rows_RD)
        rows_RD.backward(weights_RD)
        exact_TD = weights_RD.double()[plan.inverse_R].view(130, 2, 300).sum(1)
        torch.testing.assert_close(x_TD.grad.double(), exact_TD, rtol=rounding, atol=1e-6)


def test_no_tokens() -> None:
    plan = plan_dispatch(torch.zeros(0, 2, dtype=torch.int64), EXPERTS)
    x_TD, gates_TK = leaves(torch.zeros(0, WIDTH), torch.zeros(0, 2))
    out_TD = combine(dispatch(x_TD, plan), gates_TK, plan)
    out_TD.sum().backward()
    assert out_TD.shape == x_TD.grad.shape == (0, WIDTH) and gates_TK.grad.shape == (0, 2)


def test_the_compiled_operators_keep_torchs_contract(kernels: str) -> None:
    if kernels == "reference":
        pytest.skip("the torch functions are no operators")
    plan = plan_dispatch(expert_ids(33, 2, "mixed"), EXPERTS)
    x_TD, gates_TK = leaves(torch.randn(33, 20), torch.rand(33, 2))
    assert runs_compiled(x_TD)
    operators = torch.ops.sra_kernels
    torch.library.opcheck(operators.dispatch.default, (x_TD, plan.inverse_R))
    rows_RD = torch.randn(66, 20, requires_grad=True)
    torch.library.opcheck(operators.combine.default, (rows_RD, gates_TK, plan.inverse_R))

    def layer(x_TD: Tensor, gates_TK: Tensor) -> Tensor:
        return combine(dispatch(x_TD, plan).tanh(), gates_TK, plan)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x_TD, gates_TK), layer(x_TD, gates_TK))


def test_rows_that_are_not_contiguous() -> None:
    plan = plan_dispatch(expert_ids(40, 2, "mixed"), EXPERTS)
    wide_TD = torch.randn(40, 2 * WIDTH)[:, ::2]
    assert torch.equal(dispatch(wide_TD, plan), dispatch_reference(wide_TD, plan))
    y_RD, gates_TK = torch.randn(WIDTH, 80).T, torch.rand(2, 40).T
    near = combine_reference(y_RD, gates_TK, plan)
    torch.testing.assert_close(combine(y_RD, gates_TK, plan), near)


def test_a_plan_of_other_tokens_is_refused_in_words(kernels: str) -> None:
    if kernels == "reference":
        pytest.skip("the torch functions have their own words")
    plan = plan_dispatch(expert_ids(12, 2, "mixed"), EXPERTS)
    with pytest.raises(RuntimeError, match="a row for every route of 7 tokens expected, got 24"):
        dispatch(torch.randn(7, WIDTH), plan)
    with pytest.raises(RuntimeError, match="24 contiguous rows expected, got 20 x 5"):
        combine(torch.randn(20, WIDTH), torch.rand(12, 2), plan)
    with pytest.raises(RuntimeError, match="one for each of 24 routes, expected, got 10 x 2"):
        combine(torch.randn(24, WIDTH), torch.rand(10, 2), plan)
    beyond = plan._replace(inverse_R=plan.inverse_R + 1)
    with pytest.raises(RuntimeError, match="rows between 0 and 23 expected"):
        dispatch(torch.randn(12, WIDTH), beyond)
