"""Perplexity against closed forms and hand-made sums, whatever the batches, padding and windows."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sra_ds.data.loader import IGNORED, scoring_windows
from sra_ds.evaluation.perplexity import Perplexity, Setting, documents_within, evaluate

T = 16


def score(model, split, length=T, stride=0, batch_size=4, **options) -> Perplexity:
    """Evaluate, by default in windows without overlap."""
    result = evaluate(model, split, Setting(length, stride or length, batch_size, 0), **options)
    assert result is not None
    return result


def by_hand(model, split, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Loss and hit of each target 1..N-1: one window at a time, no padding, from the logits."""
    tokens = split.read(0, split.tokens)
    nll, hits = np.zeros(len(tokens)), np.zeros(len(tokens), bool)
    for first in range(1, len(tokens), stride):
        last = min(first + stride - 1, len(tokens) - 1)
        ids = torch.from_numpy(tokens[max(0, last - length) : last])[None]
        documents = torch.tensor([[int((ids[0, : t + 1] == 0).sum()) for t in range(ids.shape[1])]])
        with torch.no_grad():
            logits_TV = model(ids, document_ids_BT=documents).logits[0].double()
        for target in range(first, last + 1):
            row = logits_TV[target - last - 1]
            nll[target] = row.logsumexp(0) - row[tokens[target]]
            hits[target] = int(row.argmax()) == tokens[target]
    return nll, hits


@pytest.mark.parametrize("vocabulary", [2, 1000, 50_257])
def test_uniform_model_has_the_vocabulary_as_perplexity(split, stub_model, vocabulary):
    nll = math.log(vocabulary)
    model = stub_model(lambda ids, targets: torch.full(ids.shape, nll, dtype=torch.float64))
    summary = score(model, split).summary()
    tokens = split.tokens - 1
    assert summary["token_perplexity"] == pytest.approx(vocabulary, rel=1e-12)
    assert summary["nll_per_token"] == pytest.approx(nll, rel=1e-12)
    assert summary["word_perplexity"] == pytest.approx(
        vocabulary ** (tokens / split.words), rel=1e-9
    )
    assert summary["byte_perplexity"] == pytest.approx(
        vocabulary ** (tokens / split.bytes), rel=1e-9
    )
    assert summary["bits_per_byte"] == pytest.approx(tokens * math.log2(vocabulary) / split.bytes)
    assert (summary["tokens"], summary["words"], summary["bytes"]) == (
        tokens,
        split.words,
        split.bytes,
    )


def test_units_convert_into_each_other():
    result = Perplexity(
        120.0, 60, 40, 200, 15, 1.0, np.array([120.0]), np.array([60]), np.zeros((0, 0))
    )
    assert result.summary() == {
        "token_perplexity": pytest.approx(math.e**2),
        "word_perplexity": pytest.approx(math.e**3),
        "byte_perplexity": pytest.approx(math.e**0.6),
        "bits_per_byte": pytest.approx(0.6 / math.log(2)),
        "accuracy": 0.25,
        "nll_per_token": 2.0,
        "coverage": 1.0,
        "tokens": 60,
        "words": 40,
        "bytes": 200,
    }


@pytest.mark.parametrize("nll", [1e6, math.inf, math.nan])
def test_diverged_model_still_has_a_summary(nll):
    result = Perplexity(nll, 10, 10, 10, 0, 1.0, np.array([nll]), np.array([10]), np.zeros((0, 0)))
    perplexity = result.summary()["token_perplexity"]
    assert perplexity > 1e300 or math.isnan(perplexity)


def test_one_token_a_word_gives_equal_perplexities(make_split, stub_model):
    """A unigram model; the mark that ends the first document counts as one of its words."""
    split = make_split([[1, 2, 1, 1], [2, 1]], words=[5, 2])
    nll_of_token = torch.tensor([7 / 1, 7 / 4, 7 / 2], dtype=torch.float64).log()
    result = score(stub_model(lambda ids, targets: nll_of_token[targets.clamp(min=0)]), split)
    assert result.tokens == result.words == 7
    expected = math.log(7) + 4 * math.log(7 / 4) + 2 * math.log(7 / 2)
    assert result.nll == pytest.approx(expected, rel=1e-12)
    summary = result.summary()
    assert summary["word_perplexity"] == summary["token_perplexity"]


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 8), (16, 5), (16, 1), (200, 200)])
def test_losses_and_hits_equal_those_made_by_hand(model, split, length, stride):
    nll, hits = by_hand(model, split, length, stride)
    result = score(model, split, length, stride)
    assert result.nll == pytest.approx(nll.sum(), rel=1e-6)
    assert result.correct == hits.sum()
    marks = split.documents["start"].tolist()
    owners = np.searchsorted(marks, np.arange(split.tokens) - 1, side="right") - 1
    np.testing.assert_allclose(
        result.document_nll, np.bincount(owners[1:], nll[1:], len(marks)), rtol=1e-5
    )


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize("stride", [T, T // 2])
def test_batch_size_changes_nothing(model, split, batch_size, stride):
    ours = score(model, split, stride=stride, batch_size=batch_size)
    reference = score(model, split, stride=stride, batch_size=2)
    assert ours.nll == pytest.approx(reference.nll, rel=1e-6)
    assert ours[1:6] == reference[1:6]
    np.testing.assert_allclose(ours.document_nll, reference.document_nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours.document_tokens, reference.document_tokens)
    np.testing.assert_array_equal(ours.load_LE, reference.load_LE)


def test_document_sums_add_up(model, split):
    result = score(model, split)
    assert result.document_nll.sum() == pytest.approx(result.nll, rel=1e-12)
    assert result.document_tokens.sum() == result.tokens == split.tokens - 1


def test_a_documents_tokens_are_its_own_and_its_end(model, split):
    lengths = np.diff([*split.documents["start"], split.tokens])
    own = lengths.copy()
    own[-1] -= 1  # nothing marks the end of the last document
    np.testing.assert_array_equal(score(model, split).document_tokens, own)


@pytest.mark.parametrize("stride", [T, 5])
def test_load_counts_every_input_of_every_window_and_no_padding(model, split, stride):
    load_LE = score(model, split, stride=stride).load_LE
    inputs = sum(w.stop - w.start for w in scoring_windows(split.tokens, T, stride))
    assert load_LE.shape == (2, 4)
    assert load_LE.sum(1).tolist() == [2 * inputs] * 2


def test_whole_split_has_full_coverage(model, split):
    for max_tokens in (0, split.tokens, 10_000):
        assert score(model, split, max_tokens=max_tokens).coverage == 1.0


@pytest.mark.parametrize("max_tokens", [1, 10, 11, 12, 50, 100, 162])
def test_a_cap_keeps_whole_documents_and_their_words_and_bytes(split, stub_model, max_tokens):
    model = stub_model(lambda ids, targets: targets.clamp(min=0).double())
    starts = [*split.documents["start"].tolist(), split.tokens]
    whole = [n for n, (_, stop) in enumerate(pairwise(starts)) if stop <= max_tokens] or [0]
    result = score(model, split, max_tokens=max_tokens)
    kept = len(whole)
    assert documents_within(split, max_tokens) == kept
    assert result.tokens == starts[kept]  # with the mark that ends the last of them
    assert result.words == split.documents["words"][:kept].sum()
    assert result.bytes == split.documents["bytes"][:kept].sum()
    assert result.coverage == pytest.approx(result.tokens / (split.tokens - 1))
    assert result.coverage < 1
    everything = score(model, split).document_nll
    np.testing.assert_array_equal(result.document_nll, everything[:kept])


def test_tokens_are_weighted_not_batches(split, stub_model):
    """The published figures are means over batches, of which the last is short."""

    def loss_grows(ids, targets):
        return targets.clamp(min=0).double()

    result = score(stub_model(loss_grows), split, batch_size=3)
    targets = split.read(1, split.tokens).astype(float)
    per_batch = [chunk.mean() for chunk in np.split(targets, range(3 * T, len(targets), 3 * T))]
    assert result.nll / result.tokens == pytest.approx(targets.mean(), rel=1e-12)
    assert abs(np.mean(per_batch) - targets.mean()) > 0.5


def test_padding_leaves_the_loss_unchanged(model, split):
    ids = torch.from_numpy(split.read(0, 12))[None]
    targets = torch.from_numpy(split.read(1, 13))[None]
    documents = (ids == 0).cumsum(-1)
    valid = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        plain = model(ids, targets, documents)
        padded = model(
            F.pad(ids, (0, 5)),
            F.pad(targets, (0, 5), value=IGNORED),
            F.pad(documents, (0, 5), value=9),
            F.pad(valid, (0, 5)),
        )
    assert float(padded.loss_sum) == pytest.approx(float(plain.loss_sum), rel=1e-6)
    assert int(padded.token_count) == int(plain.token_count) == 12
    assert not padded.token_nll_BT[:, 12:].any()
    for ours, theirs in zip(padded.routings, plain.routings, strict=True):
        assert torch.equal(ours.load_E, theirs.load_E)


def test_more_context_helps_a_model_that_copies(make_split, stub_model):
    """With stride 1 every target but the first few has a whole window before it."""
    split = make_split([[5, 6, 7, 8] * 10])

    def seen_before(ids, targets):
        seen = torch.stack(
            [(ids[:, : t + 1] == targets[:, t : t + 1]).any(-1) for t in range(ids.shape[1])], -1
        )
        return torch.where(seen, 1.0, 3.0)

    apart, sliding = (score(stub_model(seen_before), split, 8, stride).nll for stride in (8, 1))
    assert sliding == 40 + 2 * 4
    assert apart > sliding


def test_evaluation_leaves_the_model_bit_identical(model, split):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score(model, split)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_draws_no_random_numbers(model, split):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = score(model, split)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(score(model, split).document_nll, first.document_nll)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_stop_between_batches_gives_none(model, split, batches):
    answers = iter([False] * batches + [True])
    setting = Setting(T, T, 2, 0)
    assert evaluate(model, split, setting, stopped=lambda: next(answers)) is None
    assert next(answers, None) is None
