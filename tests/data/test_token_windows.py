"""The order is a function of (seed, epoch, index); every target is seen or scored exactly once."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sra_ds.data import shards
from sra_ds.data.loader import (
    IGNORED,
    ScoringWindow,
    TrainingWindows,
    document_ids,
    scoring_batches,
    scoring_windows,
)
from sra_ds.data.shards import TokenSplit
from sra_ds.errors import DataError
from sra_ds.training.ds_config import BatchPlan

QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DOCUMENT_LENGTHS = [7, 1, 30, 12, 3, 44, 5]


@pytest.fixture
def split(make_split) -> TokenSplit:
    """109 tokens, all of them different but for the marks."""
    numbers = iter(range(1, 1000))
    return make_split([[next(numbers) for _ in range(n)] for n in DOCUMENT_LENGTHS])


def windows_of(split: TokenSplit, length: int = 5, seed: int = 0) -> TrainingWindows:
    return TrainingWindows(split, length, seed, end_of_text_id=0)


def order(windows: TrainingWindows, samples: range) -> list[int]:
    """Window numbers of some samples, read off the first token of each row."""
    whole = windows.split.read(0, windows.split.tokens)
    found = []
    for sample in samples:
        row = windows.batch(sample, 1).ids_BT[0].numpy()
        starts = [
            n
            for n in range(windows.count)
            if (row == whole[n * windows.length :][: len(row)]).all()
        ]
        assert len(starts) == 1
        found += starts
    return found


@given(seed=st.integers(0, 2**32), length=st.integers(2, 20))
@QUICK
def test_each_epoch_is_a_permutation_of_all_windows(split, seed, length):
    windows = windows_of(split, length, seed)
    for epoch in range(3):
        samples = range(epoch * windows.count, (epoch + 1) * windows.count)
        assert sorted(order(windows, samples)) == list(range(windows.count))


def test_epochs_and_seeds_differ_in_order(split):
    windows = windows_of(split)
    epochs = [
        tuple(order(windows, range(e * windows.count, (e + 1) * windows.count))) for e in range(3)
    ]
    other_seed = tuple(order(windows_of(split, seed=1), range(windows.count)))
    assert len({*epochs, other_seed}) == 4


@given(step=st.integers(0, 60), batch_size=st.integers(1, 9))
@QUICK
def test_a_step_is_the_same_whatever_was_read_before(split, step, batch_size):
    used = windows_of(split)
    for earlier in range(step):
        used.batch(earlier, batch_size)
    resumed = windows_of(split).batch(step, batch_size)
    for ours, theirs in zip(used.batch(step, batch_size), resumed, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@given(
    step=st.integers(0, 20),
    micro_batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 5),
)
@QUICK
def test_rank_slices_make_up_the_step(split, step, micro_batch_size, accumulation, world_size):
    size = micro_batch_size * accumulation * world_size
    plan = BatchPlan(size, micro_batch_size, accumulation, world_size)
    whole = windows_of(split).batch(step, size)
    parts = [
        windows_of(split).batch(step, size, plan.rank_slice(micro, rank))
        for micro in range(accumulation)
        for rank in range(world_size)
    ]
    assert all(len(part.ids_BT) == micro_batch_size for part in parts)
    for name in ("ids_BT", "targets_BT", "document_ids_BT"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


@given(step=st.integers(0, 20), first=st.integers(1, 12), second=st.integers(1, 12))
@QUICK
def test_batch_size_only_groups_the_order(split, step, first, second):
    windows = windows_of(split)
    small = torch.cat(
        [windows.batch(s, first).ids_BT for s in range(step * second, (step + 1) * second)]
    )
    large = torch.cat(
        [windows.batch(s, second).ids_BT for s in range(step * first, (step + 1) * first)]
    )
    assert torch.equal(small, large)


@given(length=st.integers(2, 60))
@QUICK
def test_windows_hold_each_target_once_and_predict_the_next_token(split, length):
    windows = windows_of(split, length)
    batch = windows.windows(list(range(windows.count)))
    whole = torch.from_numpy(split.read(0, windows.count * length + 1))
    assert torch.equal(batch.ids_BT.flatten(), whole[:-1])
    assert torch.equal(batch.targets_BT.flatten(), whole[1:])
    assert windows.count == (split.tokens - 1) // length
    assert batch.valid_BT is None


def test_split_shorter_than_a_window_is_refused(split):
    assert windows_of(split, split.tokens - 1).count == 1
    with pytest.raises(DataError, match=f"has {split.tokens} tokens, fewer than one window"):
        windows_of(split, split.tokens)


@given(tokens=st.integers(0, 300), length=st.integers(1, 64), data=st.data())
@QUICK
def test_scoring_windows_score_every_target_once(tokens, length, data):
    stride = data.draw(st.integers(1, length))
    windows = scoring_windows(tokens, length, stride)
    scored = [t for w in windows for t in range(w.first_target, w.stop + 1)]
    assert scored == list(range(1, tokens))
    for start, stop, first_target in windows:
        assert 0 <= start < first_target <= stop
        assert stop - start <= length
        assert stop - start == min(length, stop)


@given(length=st.integers(1, 50), batch_size=st.integers(1, 7), data=st.data())
@QUICK
def test_scoring_batches_give_each_target_its_position_and_context(split, length, batch_size, data):
    stride = data.draw(st.integers(1, length))
    windows = scoring_windows(split.tokens, length, stride)
    whole = torch.from_numpy(split.read(0, split.tokens))
    seen = []
    for batch, positions_BT in scoring_batches(split, windows, length, batch_size, 0):
        counted = batch.targets_BT != IGNORED
        assert torch.equal(whole[positions_BT[counted]], batch.targets_BT[counted])
        assert torch.equal(whole[positions_BT[counted] - 1], batch.ids_BT[counted])
        if batch.valid_BT is not None:
            assert bool(batch.valid_BT[counted].all())
            inputs = positions_BT[batch.valid_BT] - 1
            assert torch.equal(whole[inputs], batch.ids_BT[batch.valid_BT])
        assert batch.ids_BT.shape[1] == length
        seen += positions_BT[counted].tolist()
    assert seen == list(range(1, split.tokens))


def test_a_window_may_score_nothing(split):
    empty = ScoringWindow(0, 8, 9)
    ((batch, _),) = scoring_batches(split, [empty], 8, 4, 0)
    assert bool((batch.targets_BT == IGNORED).all())


def test_document_ids_count_the_marks_of_each_row():
    ids = torch.tensor([[0, 5, 6, 0, 7, 0], [4, 4, 0, 0, 1, 2]])
    assert document_ids(ids, 0).tolist() == [[1, 1, 1, 2, 2, 3], [0, 0, 1, 2, 2, 2]]


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=20),
    shard_tokens=st.integers(1, 30),
    data=st.data(),
)
@QUICK
def test_reading_across_shards_equals_the_concatenation(make_split, lengths, shard_tokens, data):
    rng = np.random.default_rng(sum(lengths))
    documents = [rng.integers(0, 70_000, n).tolist() for n in lengths]
    whole = np.concatenate([[0, *ids] for ids in documents])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", shard_tokens)
        split = make_split(documents, "uint32")
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert split.read(start, stop).tolist() == whole[start:stop].tolist()
    assert split.read(0, split.tokens).dtype == np.int64
    assert split.tokens == len(whole)
    marks = np.cumsum([0, *(n + 1 for n in lengths)])[:-1]
    assert split.documents["start"].tolist() == marks.tolist()
