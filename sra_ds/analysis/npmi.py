"""Coherence of an expert's words: C_NPMI over sliding windows (Bouma 2009; Roeder et al. 2015).

    NPMI(i, j) = log((p_ij + eps) / (p_i p_j)) / -log(p_ij + eps)

p is the share of windows of ten words that hold a word or both; the coherence of a list of words is the
mean over its pairs. The value is that of gensim's `c_npmi`, but for words that stand twice in a window,
which gensim loses when the first of the two leaves it. Beside it stand lists of other words of the same
frequencies. Letters: W words, B blocks of documents, R draws, P pairs of words.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from sra_ds.analysis.statistics import (
    Floats,
    Measured,
    draws_of_null,
    measured,
    resampling_weights,
)
from sra_ds.analysis.words import NO_UNIT, Words

WINDOW = 10
TOP_WORDS = 10
EPS = 1e-12
POOL_WORDS = 2048
"""Words the null is drawn from; of more the common ones, and others evenly spaced over log rank."""
NEIGHBOURS = 32
"""Words of the pool nearest in rank, of which one replaces a listed word ..."""
FREQUENCY_RATIO = 2.0
"""... if it is at most this many times as common or as rare."""
FIRST_DRAWS = 999
BEYOND = 10
"""Fewer of the first draws than this at or above a list's coherence: draws go on. p is valid at every
level, that of all draws where they went on, elsewhere that of the first (Besag and Clifford 1991)."""
SEED = 0

Ints = NDArray[np.int64]


class WindowCounts(NamedTuple):
    """Windows in all, with each word, and with each pair of words; W x W, the diagonal as `single_W`."""

    windows: int
    single_W: Ints
    pairs_WW: sparse.csr_array


def count_windows(documents: Sequence[NDArray[np.integer]], words: int) -> WindowCounts:
    """Sliding windows over documents of word numbers (negative: a word that is not counted, but takes
    its place). A document shorter than a window is one window; an empty one is none."""
    rows: list[Ints] = []
    columns: list[Ints] = []
    windows = 0
    for sequence in documents:
        if not len(sequence):
            continue
        own = max(1, len(sequence) - WINDOW + 1)
        at = np.flatnonzero(sequence >= 0)
        first = (at - WINDOW + 1).clip(min=0)
        counts = at.clip(max=own - 1) - first + 1
        ends = np.cumsum(counts)
        steps = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
        rows.append(windows + np.repeat(first, counts) + steps)
        columns.append(np.repeat(sequence[at].astype(np.int64), counts))
        windows += own
    empty = [np.empty(0, np.int64)]
    row, column = np.concatenate(rows or empty), np.concatenate(columns or empty)
    holds = sparse.csr_array((np.ones(len(row), np.int32), (row, column)), (windows, words))
    holds.sum_duplicates()
    holds.data[:] = 1
    pairs_WW = sparse.csr_array(holds.T @ holds)
    return WindowCounts(windows, pairs_WW.diagonal().astype(np.int64), pairs_WW)


def npmi(pair: Floats, first: Floats, second: Floats, windows: Floats | float) -> Floats:
    """NPMI of pairs from their counts of windows; 0 where a word does not occur."""
    joint = pair / windows + EPS
    apart = (first / windows) * (second / windows)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(joint / apart) / -np.log(joint)
    return np.where(apart > 0, value, 0.0)


def c_npmi(topic: Sequence[int], counts: WindowCounts) -> float:
    """Mean NPMI over the pairs of a list of words; NaN for fewer than two."""
    if len(topic) < 2:
        return float("nan")
    i, j = np.triu_indices(len(topic), 1)
    a, b = np.asarray(topic)[i], np.asarray(topic)[j]
    pair = np.asarray(counts.pairs_WW[a, b]).ravel().astype(np.float64)
    single = counts.single_W.astype(np.float64)
    return float(npmi(pair, single[a], single[b], counts.windows).mean())


class Coherence:
    """Coherence of lists of words in a text, with null and interval.

    `words.word_of_unit_M` in the order of the text is the reference; `block_of_document` says what the
    bootstrap draws.
    """

    def __init__(self, words: Words, block_of_document: Ints, frequency_W: Ints) -> None:
        self.frequency_W = frequency_W
        self._words, self._block_of_document = words, block_of_document
        self._blocks = int(block_of_document.max(initial=0)) + 1

    def of(self, topics: Sequence[Sequence[int]], least: int, tests: int) -> list[Measured]:
        """Measure lists of word numbers, most important first; words of the null occur `least` times at
        least, and are drawn often enough for p to be adjusted over so many `tests`. Chance is 0:
        independent words."""
        pool = self._pool(least)
        used = np.unique(np.concatenate([pool, *(np.array(t, np.int64) for t in topics)]))
        number_W = np.full(len(self.frequency_W), NO_UNIT, np.int64)
        number_W[used] = np.arange(len(used))
        lists = [number_W[np.array(t, np.int64)] for t in topics]
        a, b, owner = _all_pairs(lists)
        pool_U = number_W[pool]
        null_UU = np.zeros((len(pool), len(pool)))
        windows_B, single_BU, pair_BP = [], [], []
        for documents in self._documents_by_block(number_W):
            found = count_windows(documents, len(used))
            windows_B.append(found.windows)
            single_BU.append(found.single_W)
            pair_BP.append(np.asarray(found.pairs_WW[a, b]).ravel() if len(a) else np.zeros(0))
            null_UU += found.pairs_WW[pool_U][:, pool_U].toarray()
        total = WindowTotals(
            np.array(windows_B, np.float64), np.array(single_BU, np.float64), np.array(pair_BP)
        )
        values = total.coherences(np.ones(len(windows_B)), a, b, owner, len(lists))
        weights_RB = resampling_weights(len(windows_B))
        resampled = [total.coherences(w, a, b, owner, len(lists)) for w in weights_RB]
        resampled_RN = np.array(resampled).reshape(-1, len(lists))
        null = _Null(null_UU, total.windows_B.sum(), self.frequency_W[pool])
        draws, rng = draws_of_null(tests), np.random.default_rng(SEED)
        nulls = (
            null.against(values[n], self.frequency_W[list(t)], draws, rng)
            for n, t in enumerate(topics)
        )
        return [
            measured(values[n], null_R, resampled_RN[:, n], chance=0.0)
            for n, null_R in enumerate(nulls)
        ]

    def _pool(self, least: int) -> Ints:
        order = np.argsort(-self.frequency_W, kind="stable")
        eligible = order[self.frequency_W[order] >= least]
        if len(eligible) <= POOL_WORDS:
            return eligible
        places = np.geomspace(1, len(eligible), POOL_WORDS).round() - 1
        return eligible[np.unique(places.astype(np.int64))]

    def _documents_by_block(self, number_W: Ints) -> Iterator[list[Ints]]:
        """Documents as numbers of the words in use; words out of use keep their places, punctuation
        has none."""
        words_M = self._words.word_of_unit_M
        is_word_M = words_M != NO_UNIT
        numbers_M = number_W[words_M[is_word_M]]
        documents_M = self._words.document_of_unit_M[is_word_M]
        ends = np.searchsorted(documents_M, np.arange(len(self._block_of_document)), side="right")
        parts = np.split(numbers_M, ends[:-1])
        for block in range(self._blocks):
            own = np.flatnonzero(self._block_of_document == block)
            if own.size:
                yield [parts[document] for document in own]


class WindowTotals(NamedTuple):
    """Counts of windows, block by block."""

    windows_B: Floats
    single_BU: Floats
    pair_BP: Floats

    def coherences(
        self, weights_B: NDArray[Any], a_P: Ints, b_P: Ints, owner_P: Ints, lists: int
    ) -> Floats:
        """Mean NPMI of each list's pairs in the weighted text; NaN for a list without pairs."""
        single_U = weights_B @ self.single_BU
        values_P = npmi(
            weights_B @ self.pair_BP,
            single_U[a_P],
            single_U[b_P],
            float(weights_B @ self.windows_B),
        )
        counts = np.bincount(owner_P, minlength=lists)
        sums = np.bincount(owner_P, values_P, lists)
        return np.where(counts > 0, sums / counts.clip(min=1), np.nan)


class _Null:
    """Lists of words of the same frequencies, and how coherent they are."""

    def __init__(self, pairs_UU: Floats, windows: float, frequency_U: Ints) -> None:
        single_U = pairs_UU.diagonal()
        self.npmi_UU = npmi(pairs_UU, single_U[:, None], single_U[None, :], windows)
        self.order = np.argsort(frequency_U, kind="stable")
        self.sorted_frequency = frequency_U[self.order]

    def against(
        self, value: float, frequency_T: Ints, draws: int, rng: np.random.Generator
    ) -> Floats:
        """Coherences of lists whose words are as frequent: `FIRST_DRAWS`, or `draws` if few reach
        `value`; empty for fewer than two words."""
        first_R = self._draw(frequency_T, FIRST_DRAWS, rng)
        if not first_R.size or (first_R >= value).sum() >= BEYOND:
            return first_R
        return np.concatenate([first_R, self._draw(frequency_T, draws - FIRST_DRAWS, rng)])

    def _draw(self, frequency_T: Ints, draws: int, rng: np.random.Generator) -> Floats:
        size, pool = len(frequency_T), len(self.order)
        if size < 2 or pool < 2:
            return np.empty(0)
        place_T = np.searchsorted(self.sorted_frequency, frequency_T).clip(max=pool - 1)
        first_T = (place_T - NEIGHBOURS // 2).clip(0, max(pool - NEIGHBOURS, 0))
        rarest_T = np.searchsorted(self.sorted_frequency, frequency_T / FREQUENCY_RATIO)
        end_T = np.searchsorted(self.sorted_frequency, frequency_T * FREQUENCY_RATIO, "right")
        begin_T = np.maximum(first_T, rarest_T).clip(max=place_T)
        end_T = np.minimum(first_T + NEIGHBOURS, end_T).clip(min=place_T + 1)
        words_RT = self.order[rng.integers(begin_T, end_T, (draws, size))]
        i, j = np.triu_indices(size, 1)
        values_RP = self.npmi_UU[words_RT[:, i], words_RT[:, j]]
        same_RP = words_RT[:, i] == words_RT[:, j]
        different = (~same_RP).sum(1)
        sums = np.where(same_RP, 0.0, values_RP).sum(1)
        return np.where(different > 0, sums / different.clip(min=1), np.nan)


def _all_pairs(lists: Sequence[Ints]) -> tuple[Ints, Ints, Ints]:
    """First and second word of every pair of every list, and the list it is of."""
    first, second, owner = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, words in enumerate(lists):
        i, j = np.triu_indices(len(words), 1)
        first.append(words[i])
        second.append(words[j])
        owner.append(np.full(len(i), number))
    return np.concatenate(first), np.concatenate(second), np.concatenate(owner)
