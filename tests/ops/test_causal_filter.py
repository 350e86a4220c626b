"""Filters that look back: the definition, its gradients, and what they must not see."""

import pytest
import torch

from references import assert_near
from sra_ds.ops.causal_filter import causal_filter, causal_filter_reference

SIZES = [(1, 1, 1, 1, 1), (2, 7, 3, 4, 2), (3, 63, 5, 8, 4), (1, 130, 2, 62, 1), (2, 5, 4, 8, 4)]


def case(windows: int, length: int, width: int, taps: int, past: int = 0, own: bool = False):
    x_BSD = torch.randn(windows, past + length, width, dtype=torch.float64, requires_grad=True)
    shape = (taps, width) if own else (taps,)
    h = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    starts_BS = torch.rand(windows, past + length) < 0.1
    places_S = torch.arange(past + length).expand(windows, -1)
    room_BS = places_S - (places_S * starts_BS).cummax(-1).values
    return x_BSD, h, room_BS[:, past:]


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per channel"])
@pytest.mark.parametrize("past", [0, 3, 40])
@pytest.mark.parametrize(("windows", "length", "width", "taps", "dilation"), SIZES)
def test_values_and_gradients_are_those_of_the_definition(
    windows, length, width, taps, dilation, past, own
) -> None:
    x_BSD, h, room_BT = case(windows, length, width, taps, past, own)
    weights_BTD = torch.randn(windows, length, width, dtype=torch.float64)
    found = []
    for form in (causal_filter, causal_filter_reference):
        y_BTD = form(x_BSD, h, dilation, room_BT)
        found.append((y_BTD, *torch.autograd.grad((y_BTD * weights_BTD).sum(), (x_BSD, h))))
    for mine, expected in zip(*found, strict=True):
        assert_near(mine, expected, 1e-12)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per channel"])
def test_gradients_against_differences(own) -> None:
    x_BSD, h, room_BT = case(2, 6, 3, 4, past=2, own=own)
    assert torch.autograd.gradcheck(lambda x, h: causal_filter(x, h, 2, room_BT), (x_BSD, h))


def test_fixed_taps_need_no_gradient() -> None:
    x_BSD, h, room_BT = case(2, 9, 3, 4)
    causal_filter(x_BSD, h.detach(), 1, room_BT).sum().backward()
    assert x_BSD.grad is not None and h.grad is None


def test_nothing_is_read_from_later_positions_or_before_the_document() -> None:
    length = 20
    x_BSD = torch.randn(1, length, 1, dtype=torch.float64, requires_grad=True)
    room_BT = torch.cat([torch.arange(8), torch.arange(12)])[None]
    taps = torch.rand(5, dtype=torch.float64) + 0.1
    for t in range(length):
        (gradient,) = torch.autograd.grad(causal_filter(x_BSD, taps, 2, room_BT)[0, t, 0], x_BSD)
        reached = set(gradient[0, :, 0].nonzero().flatten().tolist())
        start = 8 if t >= 8 else 0
        assert reached == {t - 2 * k for k in range(5) if t - 2 * k >= start}


def test_compiled_whole() -> None:
    x_BSD, h, room_BT = case(2, 17, 4, 4)
    torch.compiler.reset()
    compiled = torch.compile(causal_filter, fullgraph=True)
    found = []
    for form in (compiled, causal_filter):
        y_BTD = form(x_BSD, h, 2, room_BT)
        found.append((y_BTD, *torch.autograd.grad(y_BTD.square().sum(), (x_BSD, h))))
    for mine, expected in zip(*found, strict=True):
        assert_near(mine, expected, 1e-12)
