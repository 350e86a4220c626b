"""The compiled linear map against torch's, which defines it.

SRA_ONEDNN=1 has it run on any processor; where it would not, all of this is run once more with it.
"""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from commands import environment
from sra_ds.ops import linear as module
from sra_ds.ops.extension import extension, use_kernels
from sra_ds.ops.linear import LEAST_WORK, linear, linear_reference, outer_sum, runs_compiled

SIZES = [(16, 8, 8), (37, 24, 40), (130, 40, 24), (64, 1, 3), (17, 3, 1), (33, 257, 96)]
"""Rows, widths in and out."""

IN_USE = runs_compiled(torch.empty(1024, 1024), torch.empty(1024, 1024))
compiled = pytest.mark.skipif(not IN_USE, reason=f"MKL is no slower here, or {extension().reason}")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def gradients(function, *given: Tensor | None) -> list[Tensor]:
    """The value of a weighted sum's every gradient, after the value."""
    own = [t if t is None else t.detach().requires_grad_() for t in given]
    y = function(*own)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [y.detach(), *(t.grad for t in own if t is not None)]


def test_the_operator_cannot_have_been_left_out_by_accident() -> None:
    """What decides is the processor and the library alone."""
    if "cpu" in extension().devices:
        expected = bool(torch.ops.sra_kernels.onednn_is_faster())
        assert runs_compiled(torch.empty(16, 2), torch.empty(2, 2)) == expected


@pytest.mark.skipif(
    IN_USE or "cpu" not in extension().devices or not torch.backends.mkldnn.is_available(),
    reason="it is compared here, or there is nothing to compare",
)
def test_it_is_compared_on_every_processor() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__],
        env=environment() | {"SRA_ONEDNN": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0 and ", 1 skipped" in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_every_gradient_equal_the_definition(size, biased) -> None:
    rows, inputs, outputs = size
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if biased else None
    wide = [t if t is None else t.double() for t in (x, weight, bias)]
    found, exact = gradients(linear, x, weight, bias), gradients(linear_reference, *wide)
    for mine, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", [(3, 20, 8), (2, 3, 7, 8), (0, 8), (5, 0, 8), (8,), (3, 8)])
def test_any_leading_dimensions(shape) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(6, 8), torch.randn(6)
    found, expected = (
        gradients(linear, x, weight, bias),
        gradients(linear_reference, x, weight, bias),
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


@compiled
@pytest.mark.parametrize(
    "view",
    [
        lambda wide: wide[:24, :32],
        lambda wide: wide.T[:24, :32],
        lambda wide: wide[::2, ::3][:24, :32],
        lambda wide: wide[:1, :32].expand(24, 32),
        lambda wide: wide[:24, :1].expand(24, 32),
        lambda wide: wide.as_strided((24, 32), (3, 1)),
    ],
    ids=["rows", "columns", "steps", "one row", "one column", "overlapping"],
)
def test_views_of_any_strides(view) -> None:
    x, weight = view(torch.randn(100, 100)), view(torch.randn(100, 100))
    assert runs_compiled(x, weight)
    torch.testing.assert_close(linear(x, weight), x @ weight.T, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(linear(x, x[:7]), x @ x[:7].T, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("left", "right"), [(24, 40), (40, 24), (1, 30), (30, 1)])
def test_sums_of_outer_products(left, right) -> None:
    a, b = torch.randn(50, left), torch.randn(50, right)
    found = outer_sum(a, b)
    torch.testing.assert_close(found, a.T @ b, atol=2e-5, rtol=2e-5)


def test_what_the_operator_is_not_for_goes_to_torch() -> None:
    x, weight = torch.randn(20, 8), torch.randn(6, 8)
    for other in (torch.float64, torch.bfloat16):
        assert not runs_compiled(x.to(other), weight.to(other))
        torch.testing.assert_close(
            linear(x.to(other), weight.to(other)), (x.to(other) @ weight.to(other).T)
        )
    assert not runs_compiled(x[0], weight) and not runs_compiled(x, weight[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not runs_compiled(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16
    with use_kernels("reference"):
        assert not runs_compiled(x, weight)


@compiled
def test_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_WORK", LEAST_WORK)
    weight = torch.empty(64, 128)
    rows = LEAST_WORK // weight.numel()
    assert runs_compiled(torch.empty(rows, 128), weight)
    assert not runs_compiled(torch.empty(rows - 1, 128), weight)


def test_the_definition_is_what_torch_has_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 replaces it."""
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias: "another")
    assert linear(torch.ones(2, 3).double(), torch.ones(4, 3).double()) == "another"


@compiled
def test_a_bias_may_be_a_view() -> None:
    x, weight, bias = torch.randn(20, 8), torch.randn(6, 8), torch.randn(12)[::2]
    torch.testing.assert_close(linear(x, weight, bias), x @ weight.T + bias, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(
        linear(x, weight, bias[:1]), x @ weight.T + bias[:1], atol=2e-5, rtol=2e-5
    )


def test_wrong_shapes_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"20 x 8|20x8"):
        linear(torch.randn(20, 8), torch.randn(6, 9))


@compiled
def test_it_is_an_operator_to_torch() -> None:
    """Fake tensors, autograd's registration, tracing."""
    given = (torch.randn(20, 8), torch.randn(6, 8), torch.randn(6))
    linear(*given)  # registers what torch has to know
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        own = [t.clone().requires_grad_(wanted) for t, wanted in zip(given, needs, strict=True)]
        torch.library.opcheck(torch.ops.sra_kernels.linear.default, tuple(own))


@compiled
def test_gradients_have_gradients() -> None:
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)

    def twice(function) -> list[Tensor]:
        first = torch.autograd.grad(
            function(x, weight).pow(3).sum(), (x, weight), create_graph=True
        )
        return list(torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, weight)))

    for mine, theirs in zip(twice(linear), twice(linear_reference), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-2, rtol=1e-4)


@compiled
def test_it_compiles_without_a_break() -> None:
    weight, bias = torch.randn(6, 8, requires_grad=True), torch.randn(6, requires_grad=True)
    x = torch.randn(20, 8)
    whole = torch.compile(
        lambda x: linear(x, weight, bias).relu(), fullgraph=True, backend="aot_eager"
    )
    y = whole(x)
    torch.testing.assert_close(y, (x @ weight.T + bias).relu(), atol=2e-5, rtol=2e-5)
    y.sum().backward()
    assert weight.grad is not None and bias.grad is not None
