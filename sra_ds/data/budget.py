"""Batches of whole documents of similar length, as many as fit into a budget of positions.

    documents -> pieces of at most T targets -> shuffle -> pools -> sort by length -> cut -> shuffle

A piece is what one row of a batch trains on: inputs start..start+L-1 of one document and their L
targets, the last of which may be the mark that opens the next document. So every target of the
split belongs to exactly one piece. An epoch shuffles the pieces and sorts them only within pools of
about `POOL_BUDGETS` budgets: long enough that neighbours are alike and little is padding, short
enough that epochs mix. All of it is a function of (seed, epoch): a run is resumed at any batch
without stored state.

Letters: D documents, P pieces, N batches of an epoch, B rows, T positions.
"""

from bisect import bisect_right
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sra_ds.data.loader import IGNORED, Batch
from sra_ds.data.shards import TokenSplit
from sra_ds.errors import ConfigError, DataError

POOL_BUDGETS = 64

Integers = NDArray[np.int64]


class TrainingDocuments:
    """Batches of pieces of documents, rows x longest <= `budget` positions each.

    `count` is the number of batches of epoch 0; that of others may differ by a few. Raises
    `ConfigError` if the budget cannot hold a piece, `DataError` if the split has no target.
    """

    def __init__(
        self, split: TokenSplit, sequence_length: int, budget: int, seed: int, end_of_text_id: int
    ) -> None:
        if budget < sequence_length:
            raise ConfigError(
                f"a budget of {budget} positions per batch is smaller than one piece of "
                f"data.sequence_length={sequence_length}; raise the budget or lower the length"
            )
        self.split, self.budget, self.seed = split, budget, seed
        self.end_of_text_id = end_of_text_id
        self.start_P, self.length_P = pieces(
            split.documents["start"], split.tokens, sequence_length
        )
        if not len(self.start_P):
            raise DataError(f"the training split has {split.tokens} tokens and nothing to predict")
        self._epoch = epoch_layout(self.length_P, budget, seed, 0)
        self.count = len(self._epoch.first_N)
        self._first_batches = [0, self.count]

    def batch(self, number: int) -> Batch:
        """The number-th batch of the run, epoch after epoch. Each row is one document, so
        `document_ids_BT` is 0; padding is the end mark, without target and not valid."""
        rows = self._rows(number)
        shape = len(rows), int(self.length_P[rows].max())
        ids_BT = torch.full(shape, self.end_of_text_id, dtype=torch.int64)
        targets_BT = torch.full_like(ids_BT, IGNORED)
        valid_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for row, (start, length) in enumerate(
            zip(self.start_P[rows].tolist(), self.length_P[rows].tolist(), strict=True)
        ):
            tokens = torch.from_numpy(self.split.read(start, start + length + 1))
            ids_BT[row, :length], targets_BT[row, :length] = tokens[:-1], tokens[1:]
            valid_BT[row, :length] = True
        padded = not bool(valid_BT.all())
        return Batch(ids_BT, targets_BT, torch.zeros_like(ids_BT), valid_BT if padded else None)

    def targets(self, number: int) -> int:
        """Targets of that batch, its weight in the mean of a step; reads no tokens."""
        return int(self.length_P[self._rows(number)].sum())

    def _rows(self, number: int) -> Integers:
        """The pieces of a batch. Epochs differ in batches, so those before it are laid out once."""
        assert number >= 0
        while number >= self._first_batches[-1]:
            batches = len(self._enter(len(self._first_batches) - 1).first_N)
            self._first_batches.append(self._first_batches[-1] + batches)
        epoch = bisect_right(self._first_batches, number) - 1
        return self._enter(epoch).rows(number - self._first_batches[epoch])

    def _enter(self, epoch: int) -> "EpochLayout":
        if self._epoch.epoch != epoch:
            self._epoch = epoch_layout(self.length_P, self.budget, self.seed, epoch)
        return self._epoch


class EpochLayout(NamedTuple):
    """Batch n of the epoch has the pieces order_P[first_N[n] : stop_N[n]], longest first."""

    epoch: int
    order_P: Integers
    first_N: Integers
    stop_N: Integers

    def rows(self, index: int) -> Integers:
        """Numbers of the pieces of a batch."""
        return self.order_P[self.first_N[index] : self.stop_N[index]]


def pieces(start_D: Integers, tokens: int, length: int) -> tuple[Integers, Integers]:
    """First input and number of targets (1..length) of every piece of a stream of `tokens` tokens,
    whose documents begin at `start_D`."""
    stop_D = np.append(start_D[1:], tokens - 1)
    count_D = -(-(stop_D - start_D) // length)
    owner_P = np.repeat(np.arange(len(start_D)), count_D)
    nth_P = np.arange(len(owner_P)) - (np.cumsum(count_D) - count_D)[owner_P]
    start_P = start_D[owner_P] + nth_P * length
    return start_P, np.minimum(length, stop_D[owner_P] - start_P)


def epoch_layout(length_P: Integers, budget: int, seed: int, epoch: int) -> EpochLayout:
    """The batches of an epoch, in the order in which it trains on them."""
    generator = np.random.default_rng([seed, epoch])
    order_P = generator.permutation(len(length_P))
    length_P = length_P[order_P]
    end_P = np.cumsum(length_P)
    total = int(end_P[-1])
    pools = max(1, round(total / (POOL_BUDGETS * budget)))
    pool_P = (end_P - length_P) * pools // total
    by_length_P = np.lexsort((-length_P, pool_P))
    length_P = length_P[by_length_P]

    # the first piece of a batch is its longest, so it alone says how many rows fit
    pool_stop_P = np.searchsorted(pool_P, pool_P, side="right")
    stop_P = np.minimum(np.arange(len(length_P)) + budget // length_P, pool_stop_P)
    firsts, first = [], 0
    while first < len(stop_P):
        firsts.append(first)
        first = int(stop_P[first])
    first_N = generator.permutation(np.array(firsts))
    return EpochLayout(epoch, order_P[by_length_P], first_N, stop_P[first_N])
