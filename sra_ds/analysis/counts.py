"""Sparse counts of (row, expert) pairs, gathered batch by batch."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PENDING_PAIRS = 2**19


class Counts(NamedTuple):
    """Pairs that occurred, sorted by row and then by expert, and how often each did."""

    rows_P: NDArray[np.uint32]
    experts_P: NDArray[np.uint16]
    counts_P: NDArray[np.int64]


class PairCounter:
    """Counts pairs; memory is that of the different pairs and of half a million new ones, which wait in
    one place: arrays of every batch would leave holes between them."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._pending = np.empty(PENDING_PAIRS, np.int64)
        self._waiting = 0

    def add(self, rows_T: NDArray[np.int64], experts_TK: NDArray[np.int64]) -> None:
        """Each row of a batch once with each of its K experts."""
        keys = (rows_T[:, None] * self.experts + experts_TK).ravel()
        while keys.size:
            part, keys = np.split(keys, [len(self._pending) - self._waiting])
            self._pending[self._waiting : self._waiting + part.size] = part
            self._waiting += part.size
            if self._waiting == len(self._pending):
                self._merge()

    def counts(self) -> Counts:
        """Everything added so far."""
        self._merge()
        rows_P, experts_P = np.divmod(self._keys, self.experts)
        return Counts(rows_P.astype(np.uint32), experts_P.astype(np.uint16), self._counts)

    def _merge(self) -> None:
        keys, counts = np.unique(self._pending[: self._waiting], return_counts=True)
        self._waiting = 0
        merged, place = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        both = np.concatenate([self._counts, counts])
        self._keys = merged
        self._counts = np.bincount(place, both, len(merged)).astype(np.int64)


def pair_counts(experts_NK: NDArray[np.integer], experts: int) -> NDArray[np.int64]:
    """Tokens two experts serve together, E x E; the diagonal is their load."""
    counts_EE = np.zeros(experts * experts, np.int64)
    wide_NK = experts_NK.astype(np.int64)
    for first in range(wide_NK.shape[1]):
        for second in range(wide_NK.shape[1]):
            keys = wide_NK[:, first] * experts + wide_NK[:, second]
            counts_EE += np.bincount(keys, minlength=experts * experts)
    return counts_EE.reshape(experts, experts)
