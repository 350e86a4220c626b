"""Perplexity that can be compared: every target of a split once, token-weighted, in float64.

    PPL_token = exp(NLL / tokens)   PPL_word = exp(NLL / words)   bits per byte = NLL / (bytes ln 2)

NLL is the sum over all real targets, whatever the batch size or the number of processes; words and
bytes are those of the same raw text. A document's end mark counts as its last token.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sra_ds.data.loader import IGNORED, Batch, ScoringWindow, scoring_batches, scoring_windows
from sra_ds.data.shards import TokenSplit
from sra_ds.evaluation.ranks import share_of_rank
from sra_ds.heap import giving_back
from sra_ds.metrics import stacked_loads
from sra_ds.model.language_model import ModelOutput
from sra_ds.processes import sum_over_ranks

Model = Callable[..., ModelOutput]


class Perplexity(NamedTuple):
    """Result of scoring a split. `document_nll` sums to the total."""

    nll: float
    tokens: int
    words: int
    bytes: int
    correct: int
    coverage: float
    document_nll: NDArray[np.float64]
    document_tokens: NDArray[np.int64]
    load_LE: NDArray[np.float64]
    iterations_L: NDArray[np.float64] = np.empty(0)
    """Mean iterations of a token, for layers that iterate."""

    def summary(self) -> dict[str, float | int]:
        """The figures people quote."""
        return {
            "token_perplexity": exp_or_infinity(self.nll / self.tokens),
            "word_perplexity": exp_or_infinity(self.nll / max(self.words, 1)),
            "byte_perplexity": exp_or_infinity(self.nll / max(self.bytes, 1)),
            "bits_per_byte": self.nll / (max(self.bytes, 1) * math.log(2)),
            "accuracy": self.correct / self.tokens,
            "nll_per_token": self.nll / self.tokens,
            "coverage": self.coverage,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
        }


def exp_or_infinity(nats: float) -> float:
    """exp, infinite where a float has no room for it."""
    return math.exp(nats) if nats < 709 else math.inf


class Setting(NamedTuple):
    """How to score: window length T, targets per window (= T without overlap), windows per forward."""

    length: int
    stride: int
    batch_size: int
    end_of_text_id: int
    device: torch.device = torch.device("cpu")


@torch.no_grad()
def evaluate(
    model: Model,
    split: TokenSplit,
    setting: Setting,
    max_tokens: int = 0,
    progress: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Perplexity | None:
    """Score a split, or its first whole documents up to `max_tokens`; the model must be in eval mode.

    Collective when processes are connected: each scores its share and all get the sum. Returns None
    when `stopped()` says so between batches.
    """
    documents = documents_within(split, max_tokens)
    end = split.tokens
    if documents < len(split.documents):  # the mark that opens the next document ends the last
        end = int(split.documents["start"][documents]) + 1
    windows = scoring_windows(end, setting.length, setting.stride)
    share = share_of_rank(windows, setting.batch_size, ScoringWindow(0, 0, 1))
    batches = scoring_batches(
        split, share, setting.length, setting.batch_size, setting.end_of_text_id
    )
    totals = _Totals(split.documents["start"][:documents])
    count = -(-len(share) // setting.batch_size)
    for batch, positions_BT in tqdm(
        giving_back(batches), "evaluating", count, disable=not progress, leave=False
    ):
        if stopped():
            return None
        totals.add(batch, positions_BT, model(*batch.to(setting.device)))
    document_nll, document_tokens, correct, load_LE, iterations_2L = sum_over_ranks(
        totals.document_nll,
        totals.document_tokens,
        totals.correct,
        totals.load_LE,
        totals.iterations_2L,
    )
    scored = int(document_tokens.sum())
    return Perplexity(
        nll=float(document_nll.sum()),
        tokens=scored,
        words=int(split.documents["words"][:documents].sum()),
        bytes=int(split.documents["bytes"][:documents].sum()),
        correct=int(correct[0]),
        coverage=scored / max(split.tokens - 1, 1),
        document_nll=document_nll,
        document_tokens=document_tokens.astype(np.int64),
        load_LE=load_LE,
        iterations_L=iterations_2L[0] / iterations_2L[1].clip(min=1),
    )


class _Totals:
    """Float64 sums over batches, per document."""

    def __init__(self, starts: NDArray[Any]) -> None:
        self.starts = starts
        self.document_nll = np.zeros(len(starts))
        self.document_tokens = np.zeros(len(starts))
        self.correct = np.zeros(1)
        self.load_LE = np.zeros((0, 0))
        self.iterations_2L = np.zeros((2, 0))

    def add(self, batch: Batch, positions_BT: Tensor, output: ModelOutput) -> None:
        """One batch; the mark that opens the next document is the end of this one."""
        assert output.token_nll_BT is not None and output.correct_BT is not None
        counted = batch.targets_BT != IGNORED
        owner = np.searchsorted(self.starts, positions_BT[counted].numpy() - 1, side="right") - 1
        nll = output.token_nll_BT.cpu()[counted].double().numpy()
        self.document_nll += np.bincount(owner, nll, len(self.starts))
        self.document_tokens += np.bincount(owner, minlength=len(self.starts))
        self.correct += output.correct_BT.cpu()[counted].sum().item()
        if output.routings:
            load_LE = stacked_loads([r.load_E for r in output.routings]).numpy()
            self.load_LE = self.load_LE + load_LE if self.load_LE.size else load_LE
        if output.haltings:
            count_LBT = torch.stack([h.iterations_BT for h in output.haltings]).cpu().double()
            sums_L, real_L = count_LBT.nansum((1, 2)), count_LBT.isfinite().sum((1, 2))
            both_2L = torch.stack([sums_L, real_L]).numpy()
            self.iterations_2L = (
                self.iterations_2L + both_2L if self.iterations_2L.size else both_2L
            )


def capped_nll(result: Perplexity, split: TokenSplit, max_tokens: int) -> float:
    """Loss per token over the documents an evaluation capped at `max_tokens` would have scored, so that
    a whole evaluation compares with capped ones."""
    documents = min(documents_within(split, max_tokens), len(result.document_nll))
    tokens = result.document_tokens[:documents].sum()
    return float(result.document_nll[:documents].sum() / tokens)


def documents_within(split: TokenSplit, max_tokens: int) -> int:
    """How many whole documents fit into `max_tokens` (at least one; 0 tokens means all)."""
    starts: NDArray[Any] = split.documents["start"]
    if not max_tokens or split.tokens <= max_tokens:
        return len(starts)
    return max(1, int(np.searchsorted(starts, max_tokens, side="right")) - 1)
