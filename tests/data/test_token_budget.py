"""Every target once an epoch, in batches within the budget whose order depends on nothing else."""

from collections.abc import Callable
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sra_ds.data.budget import TrainingDocuments
from sra_ds.data.loader import IGNORED, Batch
from sra_ds.data.shards import TokenSplit
from sra_ds.errors import ConfigError, DataError

QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DOCUMENT_LENGTHS = [7, 1, 30, 0, 0, 12, 3, 8, 44, 2, 1, 5, 16]
MARK = 0

Piece = tuple[int, int]


@pytest.fixture
def split(make_split) -> TokenSplit:
    """Documents shorter than, as long as and longer than a piece; only the marks are alike."""
    return numbered(make_split, DOCUMENT_LENGTHS)


@pytest.fixture
def skewed(make_split) -> TokenSplit:
    """1500 documents, most of them short, some longer than 64 tokens."""
    lengths = np.random.default_rng(0).lognormal(2.5, 1.0, 1500).astype(int)
    return numbered(make_split, lengths.tolist())


def numbered(make_split: Callable[..., TokenSplit], lengths: list[int]) -> TokenSplit:
    numbers = count(1)
    return make_split([[next(numbers) for _ in range(n)] for n in lengths], "uint32")


def documents_of(
    split: TokenSplit, length: int = 8, budget: int = 24, seed: int = 0
) -> TrainingDocuments:
    return TrainingDocuments(split, length, budget, seed, end_of_text_id=MARK)


def epoch_of(documents: TrainingDocuments, first: int = 0) -> list[Batch]:
    """The batches from `first` on that together have all targets of the split."""
    batches, left = [], documents.split.tokens - 1
    while left > 0:
        batches.append(documents.batch(first + len(batches)))
        left -= documents.targets(first + len(batches) - 1)
    assert left == 0
    return batches


def show_positions(monkeypatch: pytest.MonkeyPatch, split: TokenSplit) -> None:
    """From now on the token at position p of the stream is p."""
    monkeypatch.setattr(split, "read", lambda start, stop: np.arange(start, stop))


def pieces_of(batch: Batch) -> list[Piece]:
    """(first input, targets) of each row of a batch that shows positions."""
    sizes = (batch.targets_BT != IGNORED).sum(1)
    return list(zip(batch.ids_BT[:, 0].tolist(), sizes.tolist(), strict=True))


def expected_pieces(split: TokenSplit, length: int) -> list[Piece]:
    """What `pieces` computes, one document after the other."""
    ends = [*split.documents["start"][1:].tolist(), split.tokens - 1]
    found = []
    for start, end in zip(split.documents["start"].tolist(), ends, strict=True):
        found += [(first, min(length, end - first)) for first in range(start, end, length)]
    return found


def equal(ours: Batch, theirs: Batch) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


@given(length=st.integers(1, 60), spare=st.integers(0, 100), seed=st.integers(0, 2**32))
@QUICK
def test_every_epoch_has_each_target_once_and_no_piece_crosses_a_document(
    split, length, spare, seed
):
    with pytest.MonkeyPatch.context() as patch:
        show_positions(patch, split)
        documents, first = documents_of(split, length, length + spare, seed), 0
        for _ in range(3):
            batches = epoch_of(documents, first)
            first += len(batches)
            targets = torch.cat([b.targets_BT[b.targets_BT != IGNORED] for b in batches])
            assert sorted(targets.tolist()) == list(range(1, split.tokens))
            found = [piece for batch in batches for piece in pieces_of(batch)]
            assert sorted(found) == expected_pieces(split, length)


def test_epochs_of_unequal_numbers_of_batches_follow_each_other(skewed, monkeypatch):
    show_positions(monkeypatch, skewed)
    documents, first, counts = documents_of(skewed, 64, 64), 0, []
    for _ in range(4):
        batches = epoch_of(documents, first)
        found = sorted(piece for batch in batches for piece in pieces_of(batch))
        assert found == expected_pieces(skewed, 64)
        counts.append(len(batches))
        first += len(batches)
    assert counts[0] == documents.count
    assert len(set(counts)) > 1, "the split is too even to test what it should"
    assert max(counts) - min(counts) < 0.02 * documents.count
    late = documents_of(skewed, 64, 64)
    assert equal(late.batch(first - 1), batches[-1])


@given(length=st.integers(1, 60), spare=st.integers(0, 100))
@QUICK
def test_rows_hold_the_stream_and_mark_their_padding(split, length, spare):
    documents = documents_of(split, length, length + spare)
    whole = torch.from_numpy(split.read(0, split.tokens))
    real = epoch_of(documents)
    with pytest.MonkeyPatch.context() as patch:
        show_positions(patch, split)
        positions = epoch_of(documents)
    for batch, shown in zip(real, positions, strict=True):
        rows, longest = batch.ids_BT.shape
        sizes = torch.tensor([size for _, size in pieces_of(shown)])
        valid = torch.arange(longest) < sizes[:, None]
        assert rows * longest <= length + spare
        assert longest == sizes.max() <= length and sizes.min() >= 1
        assert torch.equal(batch.ids_BT[valid], whole[shown.ids_BT[valid]])
        assert torch.equal(batch.targets_BT[valid], whole[shown.ids_BT[valid] + 1])
        assert (batch.ids_BT[~valid] == MARK).all() and (batch.targets_BT[~valid] == IGNORED).all()
        assert not batch.document_ids_BT.any() and batch.document_ids_BT.shape == valid.shape
        if valid.all():
            assert batch.valid_BT is None
        else:
            assert batch.valid_BT is not None and torch.equal(batch.valid_BT, valid)


def test_epochs_and_seeds_differ_in_order_and_grouping(split, monkeypatch):
    show_positions(monkeypatch, split)
    documents = documents_of(split)
    first = epoch_of(documents)
    runs = [first, epoch_of(documents, len(first)), epoch_of(documents_of(split, seed=1))]
    orders = [tuple(tuple(pieces_of(batch)) for batch in run) for run in runs]
    assert len(set(orders)) == 3
    assert len({frozenset(frozenset(rows) for rows in order) for order in orders}) == 3


@given(numbers=st.lists(st.integers(0, 50), min_size=1, max_size=8), seed=st.integers(0, 9))
@QUICK
def test_a_batch_is_the_same_whatever_was_read_before(split, numbers, seed):
    sequential = documents_of(split, seed=seed)
    in_order = [sequential.batch(number) for number in range(51)]
    jumping = documents_of(split, seed=seed)
    for number in numbers:
        assert equal(jumping.batch(number), in_order[number])
        assert equal(documents_of(split, seed=seed).batch(number), in_order[number])


def test_batches_take_as_many_rows_as_fit(split):
    batches = epoch_of(documents_of(split, 8, 40))
    room = [40 // b.ids_BT.shape[1] - b.ids_BT.shape[0] for b in batches]
    assert min(room) >= 0
    assert sum(r > 0 for r in room) <= 1, "only the end of the single pool may be short"


def test_similar_lengths_leave_little_padding(skewed):
    documents = documents_of(skewed, 64, 512)
    batches = epoch_of(documents)
    sorted_share = 1 - (skewed.tokens - 1) / sum(b.ids_BT.numel() for b in batches)
    lengths = np.random.default_rng(0).permutation(documents.length_P)
    rows = len(lengths) // len(batches)
    unsorted = sum(lengths[i : i + rows].max() * rows for i in range(0, len(lengths), rows))
    unsorted_share = 1 - (skewed.tokens - 1) / unsorted
    assert sorted_share < 0.1
    assert sorted_share < 0.2 * unsorted_share


def test_batches_do_not_come_in_order_of_length(skewed):
    longest = np.array([b.ids_BT.shape[1] for b in epoch_of(documents_of(skewed, 64, 512))])
    neighbours = np.corrcoef(longest[:-1], longest[1:])[0, 1]
    assert abs(neighbours) < 0.5


def test_targets_are_counted_without_reading_tokens(split, monkeypatch):
    documents = documents_of(split)
    numbers = range(3 * documents.count)
    counted = [int((documents.batch(n).targets_BT != IGNORED).sum()) for n in numbers]

    def refuse(start: int, stop: int) -> None:
        raise AssertionError("tokens were read")

    monkeypatch.setattr(split, "read", refuse)
    assert [documents_of(split).targets(n) for n in numbers] == counted


@pytest.mark.parametrize(
    ("tokens", "shapes"),
    [(1, {(1, 1)}), (8, {(1, 8)}), (9, {(2, 8)}), (20, {(3, 8)}), (28, {(3, 8), (1, 4)})],
)
def test_a_single_document(make_split, tokens, shapes):
    batches = epoch_of(documents_of(numbered(make_split, [tokens])))
    assert {tuple(batch.ids_BT.shape) for batch in batches} == shapes
    assert len(batches) == len(shapes)


def test_a_split_without_targets_is_refused(make_split):
    with pytest.raises(DataError, match="has 1 tokens and nothing to predict"):
        documents_of(make_split([[]]))


def test_budget_smaller_than_a_piece_is_refused(split):
    assert documents_of(split, 8, 8).batch(0).ids_BT.shape[0] >= 1
    with pytest.raises(ConfigError, match=r"7 positions.*sequence_length=8; raise the budget") as e:
        documents_of(split, 8, 7)
    assert "\n" not in str(e.value)
