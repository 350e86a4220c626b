"""Lists of primes, which subspaces and masks are made from."""

from typing import Annotated

from pydantic import AfterValidator


def _distinct_primes(primes: tuple[int, ...]) -> tuple[int, ...]:
    wrong = [n for n in primes if n < 2 or any(n % d == 0 for d in range(2, int(n**0.5) + 1))]
    if wrong:
        raise ValueError(f"{wrong[0]} is not a prime")
    if not primes or len(set(primes)) < len(primes):
        raise ValueError("needs one prime or more, each once")
    return primes


DistinctPrimes = Annotated[tuple[int, ...], AfterValidator(_distinct_primes)]
"""One prime or more, each once, in the order that they are given in."""
