"""Tables of labels against experts, what is read off them, and what they would be without structure.

A label is a token type, a domain or a part of speech; a table holds the routes of each label to each
expert. Letters: N tokens, K experts per token, V labels, E experts, P pairs that occur, B blocks.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sra_ds.analysis.counts import Counts
from sra_ds.analysis.statistics import (
    PERMUTATIONS,
    Floats,
    Measured,
    measured,
    resampling_weights,
)

Ints = NDArray[np.int64]
COMPARED_PAIRS = 128
"""Pairs of experts whose distributions are compared, drawn once; all of them where there are fewer."""
SEED = 0


class Table(NamedTuple):
    """Routes from V labels to E experts, as the pairs that occur."""

    rows_P: Ints
    experts_P: Ints
    counts_P: Floats
    shape: tuple[int, int]

    @property
    def row_totals_V(self) -> Floats:
        """Routes from each label."""
        return np.bincount(self.rows_P, self.counts_P, self.shape[0]).astype(np.float64)

    @property
    def load_E(self) -> Floats:
        """Routes to each expert."""
        return np.bincount(self.experts_P, self.counts_P, self.shape[1]).astype(np.float64)

    def dense(self) -> Floats:
        """V x E."""
        dense_VE = np.zeros(self.shape)
        dense_VE[self.rows_P, self.experts_P] = self.counts_P
        return dense_VE


Statistic = Callable[[Table], float]
Shuffle = Callable[[np.random.Generator], NDArray[np.integer]]
"""The labels of all tokens as they might as well have been."""


class Routes(NamedTuple):
    """Decisions of one layer on the tokens of a text, those of its untrained twin, and the block of
    documents of each token."""

    experts_NK: NDArray[np.integer]
    untrained_NK: NDArray[np.integer]
    block_N: Ints
    experts: int

    def where(self, chosen_N: NDArray[Any]) -> "Routes":
        """Those of some tokens."""
        return Routes(
            self.experts_NK[chosen_N],
            self.untrained_NK[chosen_N],
            self.block_N[chosen_N],
            self.experts,
        )


def table_from_counts(counts: Counts, rows: int, experts: int) -> Table:
    """The table of a trace's token counts."""
    return Table(
        counts.rows_P.astype(np.int64),
        counts.experts_P.astype(np.int64),
        counts.counts_P.astype(np.float64),
        (rows, experts),
    )


def make_table(
    labels_N: NDArray[np.integer], experts_NK: NDArray[np.integer], shape: tuple[int, int]
) -> Table:
    """Count the routes of each label to each expert."""
    keys = labels_N.astype(np.int64)[:, None] * shape[1] + experts_NK
    counts = np.bincount(keys.ravel(), minlength=shape[0] * shape[1])
    occurring = np.flatnonzero(counts)
    rows_P, experts_P = np.divmod(occurring, shape[1])
    return Table(rows_P, experts_P, counts[occurring].astype(np.float64), shape)


def mutual_information(table: Table) -> float:
    """I(label; expert) in bits, as counted (biased upwards for few routes: see the null)."""
    total = table.counts_P.sum()
    expected = table.row_totals_V[table.rows_P] * table.load_E[table.experts_P] / total
    occurring = table.counts_P > 0
    ratio = table.counts_P[occurring] / expected[occurring]
    return float((table.counts_P[occurring] * np.log2(ratio)).sum() / total)


def normalised_mutual_information(table: Table) -> float:
    """2 I / (H_label + H_expert), in [0, 1]; NaN if there is nothing to know."""
    entropies = _entropy(table.row_totals_V) + _entropy(table.load_E)
    return 2 * mutual_information(table) / entropies if entropies > 0 else float("nan")


def mean_divergence(table: Table) -> float:
    """Mean Jensen-Shannon divergence, in bits, between the label distributions of pairs of experts
    that are not idle; NaN for fewer than two."""
    dense_EV = table.dense().T.astype(np.float32)
    dense_EV = dense_EV[dense_EV.sum(1) > 0]
    first, second = np.triu_indices(len(dense_EV), 1)
    if not len(first):
        return float("nan")
    if len(first) > COMPARED_PAIRS:
        chosen = np.random.default_rng(SEED).choice(len(first), COMPARED_PAIRS, replace=False)
        first, second = first[chosen], second[chosen]
    dense_EV /= dense_EV.sum(1, keepdims=True)
    entropy_E = np.array([_entropy(row_V) for row_V in dense_EV])
    middle = np.array(
        [_entropy((dense_EV[a] + dense_EV[b]) / 2) for a, b in zip(first, second, strict=True)]
    )
    return float((middle - (entropy_E[first] + entropy_E[second]) / 2).mean())


def mean_label_share(table: Table) -> float:
    """Vocabulary specialisation (OLMoE, arXiv 2409.02060): of the routes of a label, the share that goes
    to the expert at hand, averaged over all routes."""
    return float((_shares_of_labels(table) * table.counts_P).sum() / table.counts_P.sum())


def expert_label_share_E(table: Table) -> Floats:
    """The same for each expert; NaN for an idle one."""
    shares_P = _shares_of_labels(table)
    sums_E = np.bincount(table.experts_P, shares_P * table.counts_P, table.shape[1])
    load_E = table.load_E
    return np.where(load_E > 0, sums_E / load_E.clip(min=1), np.nan)


def pointwise_mutual_information(table: Table) -> Floats:
    """log2 P(expert, label) / (P(expert) P(label)) of each pair that occurs."""
    expected = table.row_totals_V[table.rows_P] * table.load_E[table.experts_P]
    values_P: Floats = np.log2(table.counts_P * table.counts_P.sum() / expected)
    return values_P


def top_labels(table: Table, least: int, top: int) -> list[list[int]]:
    """For each expert the labels of largest PMI among those routed to it `least` times or more; ties go
    to the commoner and then to the lower label."""
    pmi_P = pointwise_mutual_information(table)
    enough = np.flatnonzero(table.counts_P >= least)
    order = np.lexsort(
        (table.rows_P[enough], -table.counts_P[enough], -pmi_P[enough], table.experts_P[enough])
    )
    found = enough[order]
    ends = np.searchsorted(table.experts_P[found], np.arange(table.shape[1]), side="right")
    begins = np.concatenate([[0], ends[:-1]])
    return [table.rows_P[found[a:b][:top]].tolist() for a, b in zip(begins, ends, strict=True)]


def measure(
    statistics: Mapping[str, Statistic],
    labels_N: NDArray[np.integer],
    labels: int,
    routes: Routes,
    shuffled: Shuffle | None = None,
) -> dict[str, Measured]:
    """Statistics of labels against experts, beside those of labels that are `shuffled` (none given: among
    the tokens) and of the untrained twin, with intervals over blocks of documents."""
    shape = (labels, routes.experts)
    table = make_table(labels_N, routes.experts_NK, shape)
    untrained = make_table(labels_N, routes.untrained_NK, shape)
    rng = np.random.default_rng(SEED)
    nulls: dict[str, list[float]] = {name: [] for name in statistics}
    for _ in range(PERMUTATIONS):
        again_N = rng.permutation(labels_N) if shuffled is None else shuffled(rng)
        permuted = make_table(again_N, routes.experts_NK, shape)
        for name, statistic in statistics.items():
            nulls[name].append(statistic(permuted))
    resampled: dict[str, list[float]] = {name: [] for name in statistics}
    for counts_P in _resampled_counts(table, labels_N, routes):
        again = table._replace(counts_P=counts_P)
        for name, statistic in statistics.items():
            resampled[name].append(statistic(again))
    return {
        name: measured(
            statistic(table),
            np.array(nulls[name]),
            np.array(resampled[name]),
            untrained=statistic(untrained),
        )
        for name, statistic in statistics.items()
    }


def _resampled_counts(
    table: Table, labels_N: NDArray[np.integer], routes: Routes
) -> Iterator[Floats]:
    """Counts of the table's pairs in resamples of the blocks of documents."""
    experts = table.shape[1]
    keys_P = table.rows_P * experts + table.experts_P
    blocks = np.unique(routes.block_N)
    parts_BP = np.zeros((len(blocks), len(keys_P)), np.float32)
    for number, block in enumerate(blocks):
        own = routes.block_N == block
        keys = labels_N[own].astype(np.int64)[:, None] * experts + routes.experts_NK[own]
        places = np.searchsorted(keys_P, keys.ravel())
        parts_BP[number] = np.bincount(places, minlength=len(keys_P))
    for weights_B in resampling_weights(len(blocks)).astype(np.float32):
        yield (weights_B @ parts_BP).astype(np.float64)


def _shares_of_labels(table: Table) -> Floats:
    """Of the routes of each pair's label, the share that the pair has; a resample may lack a label."""
    shares_P: Floats = table.counts_P / table.row_totals_V[table.rows_P].clip(min=1)
    return shares_P


def _entropy(counts: NDArray[np.floating]) -> float:
    """In bits, of counts that need not sum to 1."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
