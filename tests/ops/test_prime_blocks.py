"""The product from live weights alone against the dense masked product, in torch and compiled."""

import itertools

import pytest
import torch
from torch import Tensor

from references import leaves
from sra_ds.ops import prime_blocks as module
from sra_ds.ops.extension import extension, use_kernels
from sra_ds.ops.prime_blocks import BlockPlan, prime_block_product, prime_block_product_reference
from sra_ds.ops.prime_mask import prime_mask

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MANY = (7, 11, 13, 17, 19)
EXACT = {"rtol": 1e-12, "atol": 1e-12}

prime_lists = pytest.mark.parametrize("primes", [(2,), (3, 5), MANY])


def operands(
    tokens: int, columns: int, rows: int, primes: tuple[int, ...], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, BlockPlan]:
    """x, values and bias; the mask; the plan."""
    mask = prime_mask(rows, columns, primes)
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


@pytest.mark.parametrize("tokens", [1, 63, 130])
@pytest.mark.parametrize(("columns", "rows"), itertools.product([1, 5, 48, 67, 100], repeat=2))
@prime_lists
def test_product_and_gradients_equal_the_reference(
    tokens: int, columns: int, rows: int, primes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_CHUNK_TOKENS", 50)
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
    assert (parts[0] != 0).sum() == prime_mask(67, 48, MANY[:1]).sum(), "the first prime owns all"


def test_more_tokens_than_one_chunk_in_float32() -> None:
    tokens = 2 * module.CPU_CHUNK_TOKENS + 3
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


def test_operands_that_do_not_fit_the_plan_are_refused() -> None:
    (x, values, bias), _, plan = operands(6, 5, 9, (2, 3), torch.float64)
    for wrong in (x.view(2, 3, 5), x[:, :4]):
        with pytest.raises(ValueError, match="x must be tokens x 5"):
            prime_block_product(wrong, values, plan, bias)
    with pytest.raises(ValueError, match=f"values must be {len(values)} numbers"):
        prime_block_product(x, values[1:], plan, bias)


needs_compiled = pytest.mark.skipif(
    "cpu" not in extension().devices, reason="the compiled operators are not there"
)


@needs_compiled
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 130, 600])
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (5, 48), (48, 5), (67, 100), (100, 67)])
@prime_lists
def test_compiled_product_and_gradients_equal_the_reference(
    tokens: int, columns: int, rows: int, primes: tuple[int, ...]
) -> None:
    """Against float64, whose torch path is the exact one."""
    tensors, mask, plan = operands(tokens, columns, rows, primes, torch.float32)
    fast, exact = leaves(*tensors), leaves(*[tensor.double() for tensor in tensors])
    with use_kernels("compiled"):
        assert module.runs_compiled(fast[0])
        y = prime_block_product(fast[0], fast[1], plan, fast[2])
    expected = prime_block_product_reference(exact[0], exact[1], mask, exact[2])
    upstream = torch.randn_like(expected)
    y.backward(upstream.float())
    expected.backward(upstream)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(fast, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-4)


@needs_compiled
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_operator_keeps_the_promises_of_operators(threads: int) -> None:
    (x, values, _), _, plan = operands(130, 48, 67, (3, 5), torch.float32)
    assert module.runs_compiled(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        arguments = (*leaves(x, plan(values)), [3, 5], 67, plan.columns_first)
        torch.library.opcheck(torch.ops.sra_kernels.prime_blocks.default, arguments)
    finally:
        torch.set_num_threads(before)


@needs_compiled
def test_threads_change_nothing() -> None:
    tensors, _, plan = operands(1100, 48, 67, MANY, torch.float32)
    assert module.runs_compiled(tensors[0])
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        own = leaves(*tensors)
        y = prime_block_product(own[0], own[1], plan, own[2])
        y.square().sum().backward()
        results.append((y, *(tensor.grad for tensor in own)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@needs_compiled
def test_compiled_operator_refuses_what_does_not_fit() -> None:
    (x, values, _), _, plan = operands(6, 5, 9, (2, 3), torch.float32)
    assert module.runs_compiled(x)
    operator = torch.ops.sra_kernels.prime_blocks.default
    for arguments in (
        (x, plan(values)[1:], [2, 3], 9, True),
        (x.T, plan(values), [2, 3], 9, True),
        (x, plan(values), [2, 0], 9, True),
    ):
        with pytest.raises(RuntimeError, match="prime_blocks"):
            operator(*arguments)
