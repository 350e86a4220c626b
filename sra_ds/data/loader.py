"""Windows of a token stream, in an order that is a function of (seed, epoch, index) alone.

Step s of a run takes samples s*G ... (s+1)*G - 1 of that order (G windows per step); rank and micro-batch
only choose which of them to compute. So the samples of a step depend on neither the number of processes
nor the micro-batch, and any step can be resumed without stored state.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sra_ds.config import Recipe
from sra_ds.data.shards import TokenSplit
from sra_ds.errors import DataError

IGNORED = -100


class Batch(NamedTuple):
    """Model input. B windows of T tokens; `valid_BT` None means that no position is padding."""

    ids_BT: Tensor
    targets_BT: Tensor
    document_ids_BT: Tensor
    valid_BT: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        moved = [None if t is None else t.to(device, non_blocking=True) for t in self]
        return Batch(*moved)  # type: ignore[arg-type]


def random_batch(recipe: Recipe, windows: int, step: int) -> Batch:
    """Uniform random tokens, one document per window: for benchmarks and self-tests."""
    shape = (windows, recipe.data.sequence_length)
    generator = torch.Generator().manual_seed(step)
    ids_BT = torch.randint(recipe.data.tokenizer.vocab_size, shape, generator=generator)
    return Batch(ids_BT, ids_BT.roll(-1, 1), torch.zeros_like(ids_BT))


class TrainingWindows:
    """Non-overlapping windows of T+1 tokens; window i gives inputs iT..iT+T-1 and their T targets."""

    def __init__(
        self, split: TokenSplit, sequence_length: int, seed: int, end_of_text_id: int
    ) -> None:
        self.split, self.length, self.seed = split, sequence_length, seed
        self.end_of_text_id = end_of_text_id
        self.count = (split.tokens - 1) // sequence_length
        self._epoch: tuple[int, NDArray[np.int64]] | None = None
        if self.count < 1:
            raise DataError(
                f"the training split has {split.tokens} tokens, fewer than one window of "
                f"data.sequence_length+1={sequence_length + 1}"
            )

    def batch(self, step: int, batch_size: int, rank_slice: slice = slice(None)) -> Batch:
        """The windows of an optimizer step, or the part of them in `rank_slice`."""
        numbers = np.arange(step * batch_size, (step + 1) * batch_size)[rank_slice]
        return self.windows([self._window_at(int(number)) for number in numbers])

    def windows(self, numbers: list[int]) -> Batch:
        """The named windows as a batch."""
        rows = [self.split.read(n * self.length, (n + 1) * self.length + 1) for n in numbers]
        tokens = torch.from_numpy(np.stack(rows))
        ids = tokens[:, :-1].contiguous()
        return Batch(ids, tokens[:, 1:].contiguous(), document_ids(ids, self.end_of_text_id))

    def _window_at(self, sample: int) -> int:
        epoch, index = divmod(sample, self.count)
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._epoch = (epoch, order)
        return int(self._epoch[1][index])


class ScoringWindow(NamedTuple):
    """Tokens [start, stop) as context; targets first_target .. stop are scored."""

    start: int
    stop: int
    first_target: int


def scoring_windows(tokens: int, length: int, stride: int) -> list[ScoringWindow]:
    """Windows that score every target 1..tokens-1 of a stream exactly once, `stride` at a time, each
    with as much context as fits into `length` tokens."""
    windows = []
    for first in range(1, tokens, stride):
        stop = min(first + stride - 1, tokens - 1)
        windows.append(ScoringWindow(max(0, stop - length), stop, first))
    return windows


def scoring_batches(
    split: TokenSplit,
    windows: list[ScoringWindow],
    length: int,
    batch_size: int,
    end_of_text_id: int,
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of scoring windows, padded to `length`, with the stream position of every target."""
    for begin in range(0, len(windows), batch_size):
        rows = windows[begin : begin + batch_size]
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        targets = torch.full_like(ids, IGNORED)
        valid = torch.zeros_like(ids, dtype=torch.bool)
        positions = torch.zeros_like(ids)
        for row, (start, stop, first_target) in enumerate(rows):
            tokens = torch.from_numpy(split.read(start, stop + 1))
            size = stop - start
            ids[row, :size], valid[row, :size] = tokens[:-1], True
            skipped = first_target - 1 - start
            targets[row, skipped:size] = tokens[1 + skipped :]
            positions[row, :size] = torch.arange(start + 1, stop + 1)
        documents = document_ids(ids, end_of_text_id)
        yield Batch(ids, targets, documents, None if bool(valid.all()) else valid), positions


def document_ids(ids_BT: Tensor, end_of_text_id: int) -> Tensor:
    """Number of the document each token belongs to within its window; the mark opens a document."""
    return (ids_BT == end_of_text_id).cumsum(-1)
