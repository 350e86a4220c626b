"""Masks of sparse weights: entries that live where a prime divides the distance of output and input.

    W[i, j] is live  iff  some prime p of the list divides i - j        (the diagonal always is)

Letters: D columns (inputs), F rows (outputs).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def prime_mask(
    rows: int, columns: int, primes: Sequence[int], device: torch.device | None = None
) -> Tensor:
    """Bool, rows x columns: whether a prime of the list divides i - j.

    Raises ValueError for an empty list, a number that is not prime, and a prime given twice.
    """
    check_primes(primes)
    gap_FD = torch.arange(rows, device=device).unsqueeze(1) - torch.arange(columns, device=device)
    return torch.stack([gap_FD % prime == 0 for prime in primes]).any(0)


def random_mask(rows: int, columns: int, primes: Sequence[int], seed: int) -> Tensor:
    """The control: in each row as many live entries as `prime_mask` has there, at random columns.

    Bool, rows x columns, on the CPU; the same for the same seed. Raises as `prime_mask`.
    """
    live_F1 = prime_mask(rows, columns, primes).sum(1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    draws_FD = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    return draws_FD.argsort(1).argsort(1) < live_F1


def density(rows: int, columns: int, primes: Sequence[int]) -> float:
    """Share of live entries; 1 - prod(1 - 1/p) for large sizes. Raises as `prime_mask`."""
    return float(prime_mask(rows, columns, primes).double().mean())


def check_primes(primes: Sequence[int]) -> None:
    if not primes:
        raise ValueError("the list of primes is empty")
    for number in primes:
        if number < 2 or any(number % d == 0 for d in range(2, math.isqrt(number) + 1)):
            raise ValueError(f"{number} is not a prime, in {list(primes)}")
        if list(primes).count(number) > 1:
            raise ValueError(f"the prime {number} is given more than once, in {list(primes)}")
