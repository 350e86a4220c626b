"""Chunked cross-entropy against torch's with all logits at once."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from references import leaves
from sra_ds.ops.linear_cross_entropy import (
    IGNORED,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_scores,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDTH, VOCABULARY = 8, 29
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}

sizes = pytest.mark.parametrize("tokens", [1, 63, 130])
chunks = pytest.mark.parametrize("chunk", [1, 7, 130, 1000])
ignoring = pytest.mark.parametrize("ignored", ["none", "some", "all"])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def inputs(tokens: int, ignored: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    targets_N = torch.randint(VOCABULARY, (tokens,))
    if ignored == "some":
        targets_N[::3] = IGNORED
    if ignored == "all":
        targets_N[:] = IGNORED
    return (
        torch.randn(tokens, WIDTH, dtype=dtype),
        torch.randn(VOCABULARY, WIDTH, dtype=dtype),
        targets_N,
    )


@sizes
@chunks
@ignoring
@dtypes
def test_loss_and_gradients_equal_the_reference(
    tokens: int, chunk: int, ignored: str, dtype: torch.dtype
) -> None:
    h, weight, targets_N = inputs(tokens, ignored, dtype)
    fast, slow = leaves(h, weight), leaves(h, weight)
    loss, nll_N = linear_cross_entropy(*fast, targets_N, chunk)
    expected, expected_N = linear_cross_entropy_reference(*slow, targets_N)
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(loss, expected, **near)
    torch.testing.assert_close(nll_N, expected_N, **near)
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    for mine, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **near)


@chunks
def test_mean_loss_gradient_equals_torch_cross_entropy(chunk: int) -> None:
    h, weight, targets_N = inputs(63, "some", torch.float64)
    fast, slow = leaves(h, weight), leaves(h, weight)
    loss, _ = linear_cross_entropy(*fast, targets_N, chunk)
    (loss / (targets_N != IGNORED).sum()).backward()
    F.cross_entropy(slow[0] @ slow[1].T, targets_N).backward()
    for mine, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_numerical_gradients() -> None:
    h, weight, targets_N = inputs(5, "some", torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, weight: linear_cross_entropy(h, weight, targets_N, 2)[0], tuple(leaves(h, weight))
    )


def test_all_targets_ignored_is_zero_loss_and_zero_gradient() -> None:
    h, weight, targets_N = inputs(63, "all", torch.float32)
    tensors = leaves(h, weight)
    loss, nll_N = linear_cross_entropy(*tensors, targets_N, 7)
    loss.backward()
    assert loss == 0 and not nll_N.any()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in tensors)


def test_ignored_tokens_get_no_gradient() -> None:
    h, weight, targets_N = inputs(63, "some", torch.float32)
    h_ND, weight_VD = leaves(h, weight)
    linear_cross_entropy(h_ND, weight_VD, targets_N, 7)[0].backward()
    assert h_ND.grad is not None
    assert torch.equal(h_ND.grad.any(1), targets_N != IGNORED)


def test_token_losses_carry_no_gradient() -> None:
    h, weight, targets_N = inputs(5, "none", torch.float32)
    loss, nll_N = linear_cross_entropy(*leaves(h, weight), targets_N, 2)
    assert loss.requires_grad and not nll_N.requires_grad


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_huge_logits_stay_finite(scale: float) -> None:
    h, weight, targets_N = inputs(63, "some", torch.float32)
    tensors = leaves(h * scale, weight)
    loss, _ = linear_cross_entropy(*tensors, targets_N, 7)
    loss.backward()
    assert loss.isfinite()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors)


@ignoring
def test_bf16_is_float32_inside_and_finite(ignored: str) -> None:
    h, weight, targets_N = inputs(130, ignored, torch.float32)
    tensors = leaves(h.bfloat16(), weight.bfloat16())
    loss, nll_N = linear_cross_entropy(*tensors, targets_N, 7)
    loss.backward()
    assert loss.dtype == nll_N.dtype == torch.float32
    exact, _ = linear_cross_entropy_reference(*[t.detach().double() for t in tensors], targets_N)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-2, atol=0)
    for tensor in tensors:
        assert tensor.grad is not None and tensor.grad.dtype == torch.bfloat16
        assert tensor.grad.isfinite().all()


@sizes
@chunks
@ignoring
@dtypes
def test_evaluation_scores_equal_the_reference(
    tokens: int, chunk: int, ignored: str, dtype: torch.dtype
) -> None:
    h_ND, weight_VD, targets_N = inputs(tokens, ignored, dtype)
    nll_N, correct_N = linear_scores(h_ND, weight_VD, targets_N, chunk)
    _, expected_N = linear_cross_entropy_reference(h_ND, weight_VD, targets_N)
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(nll_N, expected_N, **near)
    assert torch.equal(correct_N, (h_ND @ weight_VD.T).argmax(-1) == targets_N)


class LargestLogits(TorchDispatchMode):
    """Rows of the largest tensor that is as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim == 2 and result.shape[1] == VOCABULARY:
            self.rows = max(self.rows, result.shape[0])
        return result


def test_no_more_logits_exist_than_one_chunk() -> None:
    h, weight, targets_N = inputs(63, "some", torch.float32)
    with LargestLogits() as seen:
        linear_cross_entropy(*leaves(h, weight), targets_N, 10)[0].backward()
    assert 0 < seen.rows <= 10
    with LargestLogits() as seen:
        linear_scores(h, weight, targets_N, 10)
    assert 0 < seen.rows <= 10
