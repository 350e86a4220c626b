"""Sweeps: the perplexity of each point is that of a model set so by hand, and nothing stays changed."""

import numpy as np
import pytest
import torch

from saved_runs import corpus, make_run
from sra_ds.config.steering import Steering, Suppress
from sra_ds.evaluation.perplexity import evaluate
from sra_ds.evaluation.run import Scoring, setting
from sra_ds.evaluation.sweeps import DROPPED_SHARES, choosing, drop_curve, k_sweep
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import load_run
from sra_ds.inference.steer import steered

__all__ = ["corpus", "make_run"]

CPU = torch.device("cpu")
LOAD_LE = np.array([[5, 1, 9, 3], [2, 8, 4, 6]])


@pytest.fixture
def loaded(make_run):
    return load_run(make_run().path)


def nll(loaded, split) -> float:
    """Loss per token on the same text."""
    found = evaluate(loaded.model, split, setting(loaded, Scoring(), CPU), 100)
    assert found is not None
    return float(found.summary()["nll_per_token"])


def test_k_sweep_equals_models_that_choose_k(loaded):
    with open_text(loaded) as text:
        rows = k_sweep(loaded, text.split, 100, CPU)
        assert [row["k"] for row in rows] == [1, 2, 3, 4]  # as many as there are experts
        assert all(router.top_k == 2 for router in loaded.model.routers())
        for row in rows:
            with choosing(loaded.model, row["k"]):
                assert row["nll_per_token"] == nll(loaded, text.split)
            assert row["token_perplexity"] == pytest.approx(np.exp(row["nll_per_token"]))
    assert len({row["nll_per_token"] for row in rows}) == 4


def test_the_number_of_experts_comes_back_after_an_error(loaded):
    with pytest.raises(RuntimeError), choosing(loaded.model, 4):
        raise RuntimeError
    assert all(router.top_k == 2 for router in loaded.model.routers())


def test_drop_curve_suppresses_the_least_or_the_most_loaded(loaded):
    with open_text(loaded) as text:
        rows = drop_curve(loaded, text.split, LOAD_LE, 100, CPU)
        assert len(rows) == 2 * len(DROPPED_SHARES)
        whole = nll(loaded, text.split)
        for row in rows:
            assert row["dropped"] <= 2 and row["share"] == row["dropped"] / 4  # k = 2 must be left
            if row["dropped"] == 0:
                assert row["nll_per_token"] == whole
        orders = {"least": [[1, 3], [0, 2]], "most": [[2, 0], [1, 3]]}
        for first, (top, bottom) in orders.items():
            edits = [Suppress(layer=0, expert=e) for e in top]
            edits += [Suppress(layer=1, expert=e) for e in bottom]
            with steered(loaded.model, Steering(edits=tuple(edits))):
                expected = nll(loaded, text.split)
            found = [r for r in rows if r["first"] == first and r["dropped"] == 2]
            assert found and all(row["nll_per_token"] == expected for row in found)
        assert nll(loaded, text.split) == whole
