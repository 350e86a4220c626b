"""The grouped product against the loop over groups that defines it."""

import pytest
import torch
from torch import Tensor

from references import leaves
from sra_ds.ops.grouped_linear import (
    grouped_linear,
    grouped_linear_reference,
    grouped_outer,
    grouped_rows,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GROUPS, WIDTH_IN, WIDTH_OUT = 5, 8, 24
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

sizes = pytest.mark.parametrize("rows", [1, 63, 130])
loads = pytest.mark.parametrize("load", ["mixed", "one_empty", "all_on_one"])
biases = pytest.mark.parametrize("bias", [True, False])


def groups_of_rows(rows: int, load: str) -> tuple[Tensor, Tensor]:
    """(group_of_row_R, offsets_E)."""
    group_R = torch.randint(GROUPS, (rows,)).sort().values
    if load == "one_empty":
        group_R = group_R.where(group_R != 2, 3)
    if load == "all_on_one":
        group_R = torch.full((rows,), GROUPS - 1)
    return group_R, torch.bincount(group_R, minlength=GROUPS).cumsum(0).to(torch.int32)


def inputs(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(rows, WIDTH_IN, dtype=dtype),
        torch.randn(GROUPS, WIDTH_IN, WIDTH_OUT, dtype=dtype),
        torch.randn(GROUPS, WIDTH_OUT, dtype=dtype),
    )


@sizes
@loads
@biases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_every_gradient_equal_the_loop(
    rows: int, load: str, bias: bool, dtype: torch.dtype
) -> None:
    group_R, offsets_E = groups_of_rows(rows, load)
    values = inputs(rows, dtype)
    fast, slow = leaves(*values), leaves(*values)
    weights_RO = torch.randn(rows, WIDTH_OUT, dtype=dtype)
    y_RO = grouped_linear(fast[0], fast[1], fast[2] if bias else None, offsets_E, group_R)
    expected_RO = grouped_linear_reference(
        slow[0], slow[1], slow[2] if bias else None, offsets_E, group_R
    )
    y_RO.backward(weights_RO)
    expected_RO.backward(weights_RO)
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(y_RO, expected_RO, **near)
    for mine, theirs in zip(fast[: 2 + bias], slow[: 2 + bias], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **near)


def test_an_empty_group_gets_a_zero_gradient() -> None:
    group_R, offsets_E = groups_of_rows(63, "one_empty")
    x_RI, weight_EIO, bias_EO = leaves(*inputs(63, torch.float32))
    y_RO = grouped_linear(x_RI, weight_EIO, bias_EO, offsets_E, group_R)
    y_RO.backward(torch.randn_like(y_RO))
    assert weight_EIO.grad is not None and bias_EO.grad is not None
    assert not weight_EIO.grad[2].any() and not bias_EO.grad[2].any()
    assert weight_EIO.grad[3].any() and bias_EO.grad[3].any()


@biases
def test_a_gradient_without_strides_is_accepted(bias: bool) -> None:
    group_R, offsets_E = groups_of_rows(63, "mixed")
    x_RI, weight_EIO, bias_EO = leaves(*inputs(63, torch.float32))
    grouped_linear(x_RI, weight_EIO, bias_EO if bias else None, offsets_E, group_R).sum().backward()
    expected_RI = weight_EIO.detach().sum(-1)[group_R]
    torch.testing.assert_close(x_RI.grad, expected_RI, rtol=1e-5, atol=1e-5)


@sizes
@loads
def test_bf16_is_finite_and_near(rows: int, load: str) -> None:
    group_R, offsets_E = groups_of_rows(rows, load)
    values = [value.bfloat16() for value in inputs(rows, torch.float32)]
    tensors = leaves(*values)
    y_RO = grouped_linear(*tensors, offsets_E, group_R)
    assert y_RO.dtype == torch.bfloat16
    exact_RO = grouped_linear_reference(*[v.double() for v in values], offsets_E, group_R)
    torch.testing.assert_close(y_RO.double(), exact_RO, rtol=2**-6, atol=2**-6)
    y_RO.backward(torch.randn_like(y_RO))
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors)


@loads
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_operators_keep_the_contract_of_torch(load: str, dtype: torch.dtype) -> None:
    _, offsets_E = groups_of_rows(63, load)
    x_RI, weight_EIO, _ = leaves(*inputs(63, dtype))
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(grouped_rows, (x_RI, weight_EIO, offsets_E), test_utils=tests)
    y_RO = torch.randn(63, WIDTH_OUT, dtype=dtype)
    torch.library.opcheck(grouped_outer, (x_RI.detach(), y_RO, offsets_E), test_utils=tests)


def test_numerical_gradients() -> None:
    group_R, offsets_E = groups_of_rows(7, "mixed")
    tensors = leaves(*inputs(7, torch.float64))
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: grouped_linear(x, weight, bias, offsets_E, group_R), tuple(tensors)
    )
