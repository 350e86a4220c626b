"""The masks of sparse weights against their definitions."""

import itertools

import pytest
import torch
from torch import Tensor

from sra_ds.ops.prime_mask import density, prime_mask, random_mask

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MANY = (7, 11, 13, 17, 19)


def mask_loop(rows: int, columns: int, primes: tuple[int, ...]) -> Tensor:
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for i, j, p in itertools.product(range(rows), range(columns), primes):
        if (i - j) % p == 0:
            mask[i, j] = True
    return mask


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
    for build in (prime_mask, density):
        with pytest.raises(ValueError, match=message):
            build(4, 4, primes)
    with pytest.raises(ValueError, match=message):
        random_mask(4, 4, primes, seed=0)
