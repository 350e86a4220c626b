"""Evaluation on connected processes gives the totals of one."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing

from sra_ds.data.tokenizer import train_tokenizer
from sra_ds.evaluation.legacy import FORWARD_BLOCKS, legacy_sra
from sra_ds.evaluation.perplexity import Setting, evaluate

WORLD, VOCABULARY = 2, 300


@pytest.fixture
def by_all(model, tmp_path, monkeypatch):
    """What every one of two processes gets, after an equal number of forward passes."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from gloo_evaluation import score_rank

    def score(how) -> list[Any]:
        multiprocessing.spawn(score_rank, (WORLD, tmp_path, model, how), nprocs=WORLD)
        saved = [torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in range(WORLD)]
        assert len({forwards for forwards, _ in saved}) == 1
        return [result for _, result in saved]

    return score


@pytest.mark.parametrize(
    ("batch_size", "stride", "max_tokens"),
    [(3, 5, 0), (4, 16, 40)],
    ids=["ragged shares", "a rank with nothing to score"],
)
def test_totals_do_not_depend_on_the_number_of_processes(
    model, split, by_all, batch_size, stride, max_tokens
):
    setting = Setting(16, stride, batch_size, 0)
    alone = evaluate(model, split, setting, max_tokens)
    assert alone is not None
    how = partial(evaluate, split=split, setting=setting, max_tokens=max_tokens)
    for together in by_all(how):
        assert together.nll == pytest.approx(alone.nll, rel=1e-9)
        assert together[1:6] == alone[1:6]
        np.testing.assert_allclose(together.document_nll, alone.document_nll, rtol=1e-9)
        np.testing.assert_array_equal(together.document_tokens, alone.document_tokens)
        np.testing.assert_array_equal(together.load_LE, alone.load_LE)


@pytest.mark.parametrize("blocks", [2 * FORWARD_BLOCKS + 5, 3], ids=["ragged", "one rank idle"])
def test_the_published_protocol_is_shared_among_processes(model, make_split, by_all, blocks):
    text = "\n".join(f"{n} and {n * n} " * 60 for n in range(blocks))
    tokenizer = train_tokenizer([text], VOCABULARY)
    split = make_split([tokenizer.encode(text).ids])
    arguments = {"split": split, "tokenizer": tokenizer, "blank_line": False}
    how = partial(legacy_sra, **arguments, device=torch.device("cpu"))
    alone = how(model)
    assert alone["blocks"] >= blocks and alone["first_pad"]["targets"]
    for together in by_all(how):
        for name, value in alone.items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-9)
            assert together[name] == expected, name


def test_the_published_protocol_stops_when_asked(model, make_split):
    text = "one two three " * 200
    tokenizer = train_tokenizer([text], VOCABULARY)
    split = make_split([tokenizer.encode(text).ids])
    cpu = torch.device("cpu")
    assert legacy_sra(model, split, tokenizer, False, cpu, stopped=lambda: True) is None
