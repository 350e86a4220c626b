"""Iterations by kind of token: every token once, the right number at the right place."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sra_ds.analysis.iterations import Counted, _mean, count_iterations, iterations_by_type
from sra_ds.data.loader import document_ids
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import DataError
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import load_run

CPU = torch.device("cpu")


@pytest.mark.parametrize("cap", [0, 200])
def test_every_token_has_the_count_the_model_gave_it(make_run: Callable, cap: int) -> None:
    loaded = load_run(make_run("resonance").path)
    with open_text(loaded) as text:
        counted = count_iterations(loaded, text.split, cap, 3, CPU)
        if cap:
            assert 16 < counted.tokens < text.split.tokens
        assert np.array_equal(counted.tokens_N, text.split.read(0, counted.tokens))
        last = (counted.tokens - 1) // 16 * 16
        for start in (0, 16, last - 16):
            ids_BT = torch.from_numpy(counted.tokens_N[None, start : start + 16])
            documents_BT = document_ids(ids_BT, end_of_text_id(loaded.tokenizer))
            output = loaded.model(ids_BT, document_ids_BT=documents_BT)
            expected = np.stack([h.iterations_BT[0].detach().numpy() for h in output.haltings])
            found = counted.iterations_LN[:, start : start + 16]
            np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.isnan(counted.iterations_LN[:, -1]).all()
    assert np.isfinite(counted.iterations_LN[:, :-1]).all()


def planted(loaded, by_token: Callable[[int], float]) -> Counted:
    with open_text(loaded) as text:
        split = text.split
        tokens_N: NDArray[np.int64] = split.read(0, split.tokens)
        values_N = np.array([by_token(int(token)) for token in tokens_N], np.float32)
        return Counted(tokens_N, np.array(split.documents), np.stack([values_N, values_N + 2]))


def test_means_of_planted_counts(make_run: Callable) -> None:
    loaded = load_run(make_run("resonance").path)
    dot = loaded.tokenizer.encode(".").ids[0]
    found = iterations_by_type(loaded, planted(loaded, lambda token: 3.0 if token == dot else 1.0))
    assert found["classes"]["punctuation"]["iterations"] == 4
    others = {name: own for name, own in found["classes"].items() if name != "punctuation"}
    assert others and all(own["iterations"] == 2 for own in others.values())
    low, high = found["by_layer"]
    assert high == pytest.approx(low + 2) and found["all"]["low"] <= found["all"]["iterations"]


def test_the_tokens_with_most_and_least(make_run: Callable) -> None:
    loaded = load_run(make_run("resonance").path)
    plain = planted(loaded, lambda token: 1.0)
    first, second = np.bincount(plain.tokens_N).argsort()[::-1][:2].tolist()
    given = {first: 3.0, second: 0.5}
    found = iterations_by_type(loaded, planted(loaded, lambda token: given.get(token, 1.0)))
    for name, token, expected in (("most", first, 4.0), ("least", second, 1.5)):
        times = int((plain.tokens_N[:-1] == token).sum())
        word = loaded.tokenizer.decode([token], skip_special_tokens=False)
        assert found[name][0] == {"token": word, "times": times, "iterations": expected}


def test_a_model_that_does_not_iterate_is_refused(make_run: Callable) -> None:
    loaded = load_run(make_run("dense").path)
    with open_text(loaded) as text, pytest.raises(DataError, match="does not iterate"):
        count_iterations(loaded, text.split, 100, 3, CPU)


def test_a_single_document_has_no_interval_and_several_have_one() -> None:
    values_N, all_N = np.arange(40, dtype=np.float64), np.ones(40, bool)
    alone = _mean(values_N, np.full(40, 10), all_N)
    assert alone["iterations"] == 19.5 and np.isnan(alone["low"])
    several = _mean(values_N, np.repeat([3, 9, 10, 17], 10), all_N)
    assert several["low"] < 19.5 < several["high"]
