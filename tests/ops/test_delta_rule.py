"""The chunked delta rule against the token-by-token definition, and what that promises."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from references import assert_same, leaves
from sra_ds.ops.delta_rule import DeltaRule, delta_rule, delta_rule_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BATCH, HEADS, KEYS, VALUES = 2, 3, 5, 4
NEAR = {"rtol": 1e-10, "atol": 1e-10}

sizes = pytest.mark.parametrize("positions", [1, 5, 63, 64, 130])
chunks = pytest.mark.parametrize("chunk", [1, 7, 64])
validity = pytest.mark.parametrize("valid", ["all", "some"])
cases = pytest.mark.parametrize(
    ("starts", "valid", "states"),
    [
        ("none", "all", "none"),
        ("none", "some", "carried"),
        ("none", "all", "start"),
        ("some", "all", "none"),
        ("some", "all", "both"),
        ("some", "some", "start"),
        ("some", "some", "both"),
    ],
)


class Inputs(NamedTuple):
    """Arguments of `delta_rule`, in its order."""

    q_BTHC: Tensor
    k_BTHC: Tensor
    v_BTHV: Tensor
    beta_BTH: Tensor
    decay_H: Tensor
    starts_BT: Tensor
    valid_BT: Tensor | None = None
    state_BHVC: Tensor | None = None
    start_state_HVC: Tensor | None = None

    def at(self, positions: slice | Tensor) -> "Inputs":
        """The same sequences with only these positions."""
        return self._replace(
            q_BTHC=self.q_BTHC[:, positions],
            k_BTHC=self.k_BTHC[:, positions],
            v_BTHV=self.v_BTHV[:, positions],
            beta_BTH=self.beta_BTH[:, positions],
            starts_BT=self.starts_BT[:, positions],
            valid_BT=None if self.valid_BT is None else self.valid_BT[:, positions],
        )


def inputs(
    positions: int, starts: str = "some", valid: str = "all", states: str = "both"
) -> Inputs:
    """Unit keys, a decay of 1 for one head, and documents of about four positions."""
    starts_BT = torch.rand(BATCH, positions) < (0.25 if starts == "some" else 0.0)
    valid_BT = torch.rand(BATCH, positions) < 0.7
    state_BHVC = torch.randn(BATCH, HEADS, VALUES, KEYS, dtype=torch.float64)
    return Inputs(
        torch.randn(BATCH, positions, HEADS, KEYS, dtype=torch.float64),
        F.normalize(torch.randn(BATCH, positions, HEADS, KEYS, dtype=torch.float64), dim=-1),
        torch.randn(BATCH, positions, HEADS, VALUES, dtype=torch.float64),
        2 * torch.rand(BATCH, positions, HEADS, dtype=torch.float64),
        torch.tensor([1.0, 0.9, 0.4], dtype=torch.float64),
        starts_BT,
        valid_BT if valid == "some" else None,
        state_BHVC if states in ("carried", "both") else None,
        state_BHVC[0] - 1 if states in ("start", "both") else None,
    )


def redrawn(given: Inputs, positions: slice) -> Inputs:
    """Other queries, keys, values and betas at these positions."""
    changed = [x.clone() for x in given[:4]]
    for x in changed:
        x[:, positions] = torch.rand_like(x[:, positions])
    return Inputs(*changed, *given[4:])


def mapped(given: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """`change` of everything but the masks."""
    return Inputs(*(x if x is None or x.dtype == torch.bool else change(x) for x in given))


def with_gradients(given: Inputs) -> Inputs:
    return mapped(given, lambda x: leaves(x)[0])


def gradients_of(given: Inputs) -> dict[str, Tensor]:
    """The gradient of every input by name; zeros where none arrived."""
    return {
        name: torch.zeros_like(x) if x.grad is None else x.grad
        for name, x in given._asdict().items()
        if x is not None and x.requires_grad
    }


def assert_near(actual: DeltaRule, expected: DeltaRule) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **NEAR)


def weighed(result: DeltaRule) -> Tensor:
    """A number in which every element of the result counts differently."""
    return sum((x * torch.linspace(-1, 2, x.numel()).view_as(x)).sum() for x in result)


@sizes
@cases
def test_chunks_equal_the_reference_with_every_gradient(
    positions: int, starts: str, valid: str, states: str
) -> None:
    given = inputs(positions, starts, valid, states)
    slow = with_gradients(given)
    expected = delta_rule_reference(*slow)
    weighed(expected).backward()
    for chunk in (1, 7, 64):
        fast = with_gradients(given)
        result = delta_rule(*fast, chunk=chunk)
        assert_near(result, expected)
        weighed(result).backward()
        assert_same(gradients_of(fast), gradients_of(slow), 1e-10)


def test_numerical_gradients() -> None:
    given = inputs(4, valid="some")
    floats = tuple(leaves(*given[:5], *given[7:]))
    assert torch.autograd.gradcheck(
        lambda *x: tuple(delta_rule(*x[:5], *given[5:7], *x[5:], chunk=3)), floats, fast_mode=True
    )


def test_reference_is_the_equation() -> None:
    given = inputs(3, "none", states="carried")
    result = delta_rule_reference(*given)
    for b in range(BATCH):
        for h in range(HEADS):
            S_VC = given.state_BHVC[b, h]
            for t in range(3):
                k_C, v_V, beta = (x[b, t, h] for x in (given.k_BTHC, given.v_BTHV, given.beta_BTH))
                forget_CC = torch.eye(KEYS) - beta * torch.outer(k_C, k_C)
                S_VC = given.decay_H[h] * S_VC @ forget_CC + beta * torch.outer(v_V, k_C)
                torch.testing.assert_close(
                    result.y_BTHV[b, t, h], S_VC @ given.q_BTHC[b, t, h], **NEAR
                )
            torch.testing.assert_close(result.state_BHVC[b, h], S_VC, **NEAR)


@chunks
@validity
@pytest.mark.parametrize("cut", [1, 20, 64])
def test_two_calls_equal_one(chunk: int, valid: str, cut: int) -> None:
    given = inputs(70, valid=valid)
    first = delta_rule(*given.at(slice(cut)), chunk=chunk)
    second = delta_rule(
        *given.at(slice(cut, None))._replace(state_BHVC=first.state_BHVC), chunk=chunk
    )
    joined = DeltaRule(torch.cat([first.y_BTHV, second.y_BTHV], 1), second.state_BHVC)
    assert_near(joined, delta_rule(*given, chunk=chunk))


@chunks
def test_nothing_flows_backwards_in_time(chunk: int) -> None:
    given = inputs(70, "none")
    changed = delta_rule(*redrawn(given, slice(30, None)), chunk=chunk).y_BTHV
    same = delta_rule(*given, chunk=chunk).y_BTHV
    torch.testing.assert_close(changed[:, :30], same[:, :30], rtol=0, atol=1e-12)
    assert not torch.isclose(changed[:, 30:], same[:, 30:]).all()


@chunks
def test_sequences_do_not_see_each_other(chunk: int) -> None:
    given = inputs(70, valid="some")
    both = delta_rule(*given, chunk=chunk)
    for b in range(BATCH):
        one = [
            x if name in ("decay_H", "start_state_HVC") else x[b : b + 1]
            for name, x in given._asdict().items()
        ]
        assert_near(
            delta_rule(*one, chunk=chunk),
            DeltaRule(both.y_BTHV[b : b + 1], both.state_BHVC[b : b + 1]),
        )


@chunks
@pytest.mark.parametrize("start", [0, 30, 69])
def test_a_start_wipes_all_before(chunk: int, start: int) -> None:
    given = inputs(70, "none")
    given.starts_BT[:, start] = True
    other = redrawn(given, slice(start))._replace(state_BHVC=torch.ones_like(given.state_BHVC))
    mine, theirs = delta_rule(*given, chunk=chunk), delta_rule(*other, chunk=chunk)
    after = DeltaRule(mine.y_BTHV[:, start:], mine.state_BHVC)
    assert_near(after, DeltaRule(theirs.y_BTHV[:, start:], theirs.state_BHVC))
    alone = given.at(slice(start, None))._replace(state_BHVC=None)
    assert_near(after, delta_rule(*alone, chunk=chunk))


@chunks
def test_invalid_positions_are_as_if_absent(chunk: int) -> None:
    given = inputs(70)
    valid_T = torch.rand(70) < 0.6
    marked = given._replace(valid_BT=valid_T.expand(BATCH, -1))
    result = delta_rule(*marked, chunk=chunk)
    assert (given.starts_BT & ~valid_T).any() and result.y_BTHV.isfinite().all()
    kept = DeltaRule(result.y_BTHV[:, valid_T], result.state_BHVC)
    assert_near(kept, delta_rule(*given.at(valid_T), chunk=chunk))


@chunks
def test_orthogonal_keys_recall_their_values(chunk: int) -> None:
    keys = 12
    k_CC = torch.linalg.qr(torch.randn(keys, keys, dtype=torch.float64)).Q
    v_CV = torch.randn(keys, VALUES, dtype=torch.float64)
    overwritten_CV = torch.randn_like(v_CV)
    k_BTHC = torch.cat([k_CC, k_CC, k_CC]).view(1, 3 * keys, 1, keys)
    v_BTHV = torch.cat([overwritten_CV, v_CV, v_CV]).view(1, 3 * keys, 1, VALUES)
    beta_BTH = (torch.arange(3 * keys) < 2 * keys).double().view(1, -1, 1)
    starts_BT = torch.zeros(1, 3 * keys, dtype=torch.bool)
    one = torch.ones(1, dtype=torch.float64)
    y_BTHV = delta_rule(k_BTHC, k_BTHC, v_BTHV, beta_BTH, one, starts_BT, chunk=chunk).y_BTHV
    torch.testing.assert_close(y_BTHV, v_BTHV, **NEAR)


def test_long_strong_decay_in_float32_is_near_float64() -> None:
    given = inputs(512, "none")._replace(decay_H=torch.full((HEADS,), 0.5, dtype=torch.float64))
    single, double = with_gradients(mapped(given, Tensor.float)), with_gradients(given)
    result, expected = delta_rule(*single, chunk=512), delta_rule(*double, chunk=512)
    for mine, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    weighed(result).backward()
    weighed(expected).backward()
    rounded = {name: grad.double() for name, grad in gradients_of(single).items()}
    assert_same(rounded, gradients_of(double), 1e-3)


@pytest.mark.parametrize("run", [delta_rule, delta_rule_reference])
def test_bf16_is_float32_inside_even_under_autocast(run: Callable[..., DeltaRule]) -> None:
    given = with_gradients(mapped(inputs(70, valid="some"), Tensor.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        result = run(*given)
    assert result.y_BTHV.dtype == torch.bfloat16 and result.state_BHVC.dtype == torch.float32
    exact = delta_rule_reference(*mapped(given, Tensor.double))
    torch.testing.assert_close(result.state_BHVC.double(), exact.state_BHVC, rtol=1e-4, atol=1e-4)
    weighed(result).backward()
    assert result.y_BTHV.isfinite().all()
    for grad in gradients_of(given).values():
        assert grad.dtype == torch.bfloat16 and grad.isfinite().all()


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunks_hold_a_position(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk must be at least 1, is {chunk}"):
        delta_rule(*inputs(5), chunk=chunk)
