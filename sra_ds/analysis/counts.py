"""Sparse counts of (row, expert) pairs, gathered batch by batch."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PENDING_PAIRS = 2**21


class Counts(NamedTuple):
    """Pairs that occurred, sorted by row and then by expert, and how often each did."""

    rows_P: NDArray[np.uint32]
    experts_P: NDArray[np.uint16]
    counts_P: NDArray[np.int64]


class PairCounter:
    """Counts pairs; memory is that of the different pairs and of about two million new ones."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._pending: list[NDArray[np.int64]] = []
        self._waiting = 0

    def add(self, rows_T: NDArray[np.int64], experts_TK: NDArray[np.int64]) -> None:
        """Each row of a batch once with each of its K experts."""
        keys = (rows_T[:, None] * self.experts + experts_TK).ravel()
        self._pending.append(keys)
        self._waiting += keys.size
        if self._waiting >= PENDING_PAIRS:
            self._merge()

    def counts(self) -> Counts:
        """Everything added so far."""
        self._merge()
        rows_P, experts_P = np.divmod(self._keys, self.experts)
        return Counts(rows_P.astype(np.uint32), experts_P.astype(np.uint16), self._counts)

    def _merge(self) -> None:
        keys, counts = np.unique(
            np.concatenate([np.empty(0, np.int64), *self._pending]), return_counts=True
        )
        self._pending, self._waiting = [], 0
        merged, place = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        both = np.concatenate([self._counts, counts])
        self._keys = merged
        self._counts = np.bincount(place, both, len(merged)).astype(np.int64)
