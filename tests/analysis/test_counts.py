"""Sparse counts of pairs against counting one by one."""

from collections import Counter

import numpy as np
import pytest

from sra_ds.analysis import counts
from sra_ds.analysis.counts import PairCounter


@pytest.mark.parametrize("pending", [1, 63, 2**19])
@pytest.mark.parametrize(("rows", "experts", "top_k"), [(1, 1, 1), (7, 5, 5), (70_000, 300, 2)])
def test_pairs_are_counted_as_one_by_one(
    rows: int, experts: int, top_k: int, pending: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of awkward sizes, merged often, once in a while and only at the end."""
    monkeypatch.setattr(counts, "PENDING_PAIRS", pending)
    rng = np.random.default_rng(0)
    counter, one_by_one = PairCounter(experts), Counter()
    for size in (1, 63, 0, 130):
        rows_T = rng.integers(max(0, rows - 9), rows, size)
        experts_TK = rng.integers(0, experts, (size, top_k))
        counter.add(rows_T, experts_TK)
        one_by_one.update(
            (int(row), int(expert))
            for row, chosen in zip(rows_T, experts_TK, strict=True)
            for expert in chosen
        )
    found = counter.counts()
    pairs = list(zip(found.rows_P.tolist(), found.experts_P.tolist(), strict=True))
    assert pairs == sorted(one_by_one)
    assert found.counts_P.tolist() == [one_by_one[pair] for pair in pairs]


def test_nothing_added_is_no_pair() -> None:
    assert [len(part) for part in PairCounter(4).counts()] == [0, 0, 0]
