"""What a language model is asked for here: how unlikely rows of tokens are, and how prompts go on.

A row or prompt is one document, opened by the token that opens documents.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from sra_ds.data.loader import IGNORED

TOKENS_AT_ONCE = 2048
PROMPTS_AT_ONCE = 16
TOP_P = 0.95


class TextModel(Protocol):
    """What texts can be scored with and written by."""

    name: str
    window: int
    """Longest row of tokens it is made for, with the one that opens it."""
    opening: int
    device: torch.device

    def encode(self, text: str) -> list[int]:
        """Token ids, without any that open or close a document."""

    def token_nll(self, ids_BT: Tensor, targets_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """-log p of each target, 0 where it is `IGNORED`."""

    def continuations(self, prompts: Sequence[str], most: int, seed: int) -> list[str]:
        """What is drawn after each prompt with temperature 1 and top-p 0.95, `most` tokens at most."""


class Row(NamedTuple):
    """A document in pieces of tokens, which rows may share; the first `given` tokens are not scored."""

    pieces: Sequence[Sequence[int]]
    given: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.pieces))


@torch.inference_mode()
def row_nll(model: TextModel, rows: Sequence[Row], what: str) -> NDArray[np.float64]:
    """-log p of the scored tokens of each row, summed; rows of similar length go together."""
    total = np.zeros(len(rows))
    with tqdm(total=len(rows), desc=what, leave=False) as bar:
        for chosen in _batches([row.tokens for row in rows]):
            total[chosen] = _batch_nll(model, [rows[number] for number in chosen])
            bar.update(len(chosen))
    return total


def prompt_batches(prompts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Prompts that are continued side by side, with progress."""
    for start in tqdm(range(0, len(prompts), PROMPTS_AT_ONCE), "writing", leave=False):
        yield prompts[start : start + PROMPTS_AT_ONCE]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of rows by length, as many as `TOKENS_AT_ONCE` has room for with their padding."""
    batch: list[int] = []
    for number in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[number] > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _batch_nll(model: TextModel, rows: Sequence[Row]) -> NDArray[np.float64]:
    tokens = [torch.tensor([model.opening, *chain(*row.pieces)]) for row in rows]
    lengths_B1 = torch.tensor([[len(own) - 1] for own in tokens])
    given_B1 = torch.tensor([[row.given] for row in rows])
    ids_BT = pad_sequence([own[:-1] for own in tokens], True, model.opening)
    targets_BT = pad_sequence([own[1:] for own in tokens], True, IGNORED)
    at_T = torch.arange(ids_BT.shape[1])
    targets_BT = targets_BT.where(at_T >= given_B1, IGNORED)
    batch = (part.to(model.device) for part in (ids_BT, targets_BT, at_T < lengths_B1))
    nll_B: NDArray[np.float64] = model.token_nll(*batch).cpu().double().sum(1).numpy()
    return nll_B
