"""What a change to a model costs, on models whose loss is known."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sra_ds.config import Recipe
from sra_ds.data.shards import TokenSplit
from sra_ds.data.tokenizer import train_tokenizer
from sra_ds.errors import DataError
from sra_ds.evaluation.difference import perplexity_difference, validation_split
from sra_ds.inference.load import LoadedRun
from sra_ds.storage.run_dir import RunDir

CPU = torch.device("cpu")


@pytest.fixture
def loaded(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[[Any], LoadedRun]:
    """A run with a model of the test's own."""
    tokenizer = train_tokenizer(["a"], 257)

    def make(model: Any) -> LoadedRun:
        return LoadedRun(RunDir(tmp_path), tiny_recipe(), model, tokenizer, tmp_path, {})

    return make


def test_the_difference_is_that_of_the_losses(
    loaded: Callable[[Any], LoadedRun], stub_model: Callable[..., Any], split: TokenSplit
) -> None:
    """One nat a token before; after it half a nat more on odd targets."""
    before = stub_model(lambda ids, targets: torch.ones_like(targets))
    after = stub_model(lambda ids, targets: 1 + 0.5 * (targets % 2))
    found = perplexity_difference(loaded(before), loaded(after), split, 0, CPU)
    ids = split.read(0, split.tokens)
    worse = float(np.mean(ids[1:] % 2)) / 2
    assert found["before"] == pytest.approx(math.e)
    assert found["after"] == pytest.approx(math.exp(1 + worse))
    assert found["difference"] == pytest.approx(math.exp(1 + worse) - math.e)
    assert found["worse_by_nats_per_token"] == pytest.approx(worse)
    assert found["low"] < worse < found["high"]
    assert found["tokens"] == split.tokens - 1 and found["documents"] == 8
    same = perplexity_difference(loaded(after), loaded(after), split, 0, CPU)
    assert same["difference"] == same["low"] == same["high"] == 0


def test_only_whole_documents_within_the_cap_count(
    loaded: Callable[[Any], LoadedRun], stub_model: Callable[..., Any], split: TokenSplit
) -> None:
    """The first four have 54 tokens with their marks, and the fifth's mark ends the fourth."""
    model = loaded(stub_model(lambda ids, targets: torch.ones_like(targets)))
    found = perplexity_difference(model, model, split, 60, CPU)
    assert (found["documents"], found["tokens"]) == (4, 54)


def test_without_a_corpus_there_is_no_split(
    loaded: Callable[[Any], LoadedRun], tmp_path: Path
) -> None:
    run = loaded(None)
    facts: tuple[dict[str, str], ...] = ({}, {"corpus_folder": str(tmp_path / "none")})
    for environment in facts:
        run.run.environment_file.write_text(json.dumps(environment))
        assert validation_split(run) is None
    run.run.environment_file.write_text(json.dumps({"corpus_folder": str(tmp_path)}))
    with pytest.raises(DataError, match=r"manifest\.json"):
        validation_split(run)
