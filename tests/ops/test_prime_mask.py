"""The prime mask against its definition, and the block product against the dense masked product."""

import itertools

import pytest
import torch
from torch import Tensor

from references import leaves
from sra_ds.ops import prime_mask as prime_mask_module
from sra_ds.ops.prime_mask import (
    BlockPlan,
    density,
    prime_block_product,
    prime_block_product_reference,
    prime_mask,
    random_mask,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MANY = (7, 11, 13, 17, 19)
EXACT = {"rtol": 1e-12, "atol": 1e-12}

prime_lists = pytest.mark.parametrize("primes", [(2,), (3, 5), MANY])


def mask_loop(rows: int, columns: int, primes: tuple[int, ...]) -> Tensor:
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for i, j, p in itertools.product(range(rows), range(columns), primes):
        if (i - j) % p == 0:
            mask[i, j] = True
    return mask


def operands(
    tokens: int, columns: int, rows: int, primes: tuple[int, ...], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, BlockPlan]:
    """x, values and bias; the mask; the plan."""
    mask = mask_loop(rows, columns, primes)
    shapes = ((tokens, columns), (int(mask.sum()),), (rows,))
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return tensors, mask, BlockPlan(rows, columns, primes)


def assert_equals_the_reference(
    tensors: list[Tensor], mask: Tensor, plan: BlockPlan, rtol: float, atol: float
) -> None:
    fast, slow = leaves(*tensors), leaves(*tensors)
    y = prime_block_product(fast[0], fast[1], plan, fast[2])
    expected = prime_block_product_reference(slow[0], slow[1], mask, slow[2])
    upstream = torch.randn_like(expected)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)
    for mine, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("primes", [(2,), (5,), (3, 2), MANY, (61, 67), (97,)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (9, 1), (23, 40), (64, 48)])
def test_mask_equals_the_definition(rows: int, columns: int, primes: tuple[int, ...]) -> None:
    mask = prime_mask(rows, columns, primes)
    assert torch.equal(mask, mask_loop(rows, columns, primes))
    assert mask.diagonal().all()
    assert density(rows, columns, primes) == pytest.approx(mask.double().mean().item())


@pytest.mark.parametrize(("size", "expected"), [(256, 0.3733), (512, 0.3639), (768, 0.3607)])
def test_density_of_square_masks(size: int, expected: float) -> None:
    assert round(density(size, size, MANY), 4) == expected


def test_density_tends_to_the_share_of_multiples() -> None:
    limit = 1 - torch.tensor([1 - 1 / p for p in MANY], dtype=torch.float64).prod().item()
    assert round(limit, 4) == 0.3587
    # the diagonal is 0, a multiple of every prime; one row of all residues has no such surplus
    assert density(1, 7 * 11 * 13 * 17 * 19, MANY) == pytest.approx(limit, abs=1e-12)
    assert abs(density(1500, 1500, MANY) - limit) < abs(density(300, 300, MANY) - limit)


def test_random_mask_has_the_same_row_counts_at_other_columns() -> None:
    mask = prime_mask(48, 64, MANY)
    control = random_mask(48, 64, MANY, seed=0)
    assert torch.equal(control.sum(1), mask.sum(1))
    assert not torch.equal(control, mask)
    # as far from the prime mask as chance: the expected overlap of independent rows
    chance = (mask.sum(1).double() ** 2 / 64).sum().item()
    assert (control & mask).sum().item() == pytest.approx(chance, rel=0.1)
    assert control.sum(0).min() > 0 and not control.diagonal().all()


def test_random_mask_depends_on_the_seed_alone() -> None:
    first = random_mask(48, 64, MANY, seed=3)
    torch.manual_seed(99)
    assert torch.equal(first, random_mask(48, 64, MANY, seed=3))
    assert not torch.equal(first, random_mask(48, 64, MANY, seed=4))


@pytest.mark.parametrize("tokens", [1, 63, 130])
@pytest.mark.parametrize(("columns", "rows"), itertools.product([1, 5, 48, 67, 100], repeat=2))
@prime_lists
def test_product_and_gradients_equal_the_reference(
    tokens: int, columns: int, rows: int, primes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prime_mask_module, "CPU_CHUNK_TOKENS", 50)
    assert_equals_the_reference(*operands(tokens, columns, rows, primes, torch.float64), **EXACT)


def test_a_prime_larger_than_the_weight_keeps_the_diagonal() -> None:
    assert_equals_the_reference(*operands(63, 5, 9, (97,), torch.float64), **EXACT)


def test_order_of_the_primes_does_not_matter() -> None:
    (x, values, bias), _, plan = operands(63, 48, 67, MANY, torch.float64)
    other = BlockPlan(67, 48, MANY[::-1])
    y = prime_block_product(x, values, plan, bias)
    torch.testing.assert_close(prime_block_product(x, values, other, bias), y, **EXACT)


def test_blocks_hold_every_live_value_once() -> None:
    _, mask, plan = operands(1, 48, 67, MANY, torch.float64)
    values = torch.arange(1.0, mask.sum() + 1)
    blocks = plan(values)
    assert torch.equal(blocks[blocks != 0].sort().values, values)
    assert torch.equal(blocks[plan.place_N], values)
    parts = plan.split(blocks)
    assert [tuple(part.shape) for part in parts] == [(p, -(-67 // p), -(-48 // p)) for p in MANY]
    assert (parts[0] != 0).sum() == mask_loop(67, 48, MANY[:1]).sum(), "the first prime owns all"


def test_more_tokens_than_one_chunk_in_float32() -> None:
    tokens = 2 * prime_mask_module.CPU_CHUNK_TOKENS + 3
    assert_equals_the_reference(*operands(tokens, 67, 48, MANY, torch.float32), 1e-4, 1e-4)


def test_bf16_is_as_close_as_the_dense_product() -> None:
    tensors, mask, plan = operands(130, 67, 100, MANY, torch.bfloat16)
    fast, exact = leaves(*tensors), leaves(*[tensor.double() for tensor in tensors])
    y = prime_block_product(fast[0], fast[1], plan, fast[2])
    expected = prime_block_product_reference(exact[0], exact[1], mask, exact[2])
    y.sum().backward()
    expected.sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.05)
    for mine, theirs in zip(fast, exact, strict=True):
        assert mine.grad is not None and mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0.02, atol=0.2)


def test_autocast_computes_in_bf16_and_gives_float32_gradients() -> None:
    tensors, mask, plan = operands(63, 48, 67, MANY, torch.float32)
    fast, slow = leaves(*tensors), leaves(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        y = prime_block_product(fast[0], fast[1], plan, fast[2])
        expected = prime_block_product_reference(slow[0], slow[1], mask, slow[2])
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.03, atol=0.1)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    for mine, theirs in zip(fast, slow, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert mine.grad.dtype == torch.float32
        assert (mine.grad - theirs.grad).norm() < 0.02 * theirs.grad.norm()


def test_autocast_leaves_float64_alone() -> None:
    tensors, mask, plan = operands(63, 48, 67, MANY, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equals_the_reference(tensors, mask, plan, **EXACT)


@pytest.mark.parametrize(("columns", "rows"), [(4, 7), (7, 4)])
def test_numerical_gradients(columns: int, rows: int) -> None:
    tensors, _, plan = operands(3, columns, rows, (2, 3), torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, values, bias: prime_block_product(x, values, plan, bias), tuple(leaves(*tensors))
    )


def test_no_bias_and_no_tokens() -> None:
    (x, values, _), mask, plan = operands(5, 48, 67, MANY, torch.float64)
    x, values = leaves(x, values)
    y = prime_block_product(x, values, plan, None)
    torch.testing.assert_close(y, prime_block_product_reference(x, values, mask, None), **EXACT)
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    (none,) = leaves(x[:0])
    nothing = prime_block_product(none, values, plan, None)
    nothing.sum().backward()
    assert nothing.shape == (0, 67) and none.grad is not None


def test_without_gradients_the_product_is_the_same() -> None:
    (x, values, bias), _, plan = operands(63, 48, 67, MANY, torch.float64)
    with torch.no_grad():
        quiet = prime_block_product(x, values, plan, bias)
    assert torch.equal(quiet, prime_block_product(*leaves(x, values), plan, bias))


def test_strided_x_and_strided_gradient() -> None:
    (x, values, bias), mask, plan = operands(63, 48, 67, MANY, torch.float64)
    wide = torch.stack([x, torch.full_like(x, torch.nan)], -1)
    for strided in (wide[..., 0], x.T.contiguous().T):
        fast, slow = strided.detach().requires_grad_(), x.clone().requires_grad_()
        y = prime_block_product(fast, values, plan, bias)
        expected = prime_block_product_reference(slow, values, mask, bias)
        torch.testing.assert_close(y, expected, **EXACT)
        y.T.contiguous().square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(fast.grad, slow.grad, **EXACT)


def test_the_plan_moves_with_its_module_and_is_not_saved() -> None:
    holder = torch.nn.ModuleDict({"plan": BlockPlan(9, 5, (2, 3))})
    assert not holder.state_dict() and not list(holder.parameters())
    assert holder.bfloat16()["plan"].place_N.dtype == torch.int64
    assert holder.to("meta")["plan"].place_N.is_meta


@pytest.mark.parametrize(
    ("primes", "message"),
    [
        ((), "list of primes is empty"),
        ((7, 9), "9 is not a prime"),
        ((1,), "1 is not a prime"),
        ((0,), "0 is not a prime"),
        ((-7,), "-7 is not a prime"),
        ((7, 11, 7), "7 is given more than once"),
    ],
)
def test_bad_lists_say_what_is_wrong(primes: tuple[int, ...], message: str) -> None:
    for build in (prime_mask, density, BlockPlan):
        with pytest.raises(ValueError, match=message):
            build(4, 4, primes)
    with pytest.raises(ValueError, match=message):
        random_mask(4, 4, primes, seed=0)


def test_operands_that_do_not_fit_the_plan_are_refused() -> None:
    (x, values, bias), _, plan = operands(6, 5, 9, (2, 3), torch.float64)
    for wrong in (x.view(2, 3, 5), x[:, :4]):
        with pytest.raises(ValueError, match="x must be tokens x 5"):
            prime_block_product(wrong, values, plan, bias)
    with pytest.raises(ValueError, match=f"values must be {len(values)} numbers"):
        prime_block_product(x, values[1:], plan, bias)
