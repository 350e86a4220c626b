"""Saved runs of tiny models, one of them loaded and traced, and the tool in this process."""

import pytest

from saved_runs import call, corpus, make_run
from sra_ds.analysis.traces import Pass, record
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import load_run

__all__ = ["call", "corpus", "make_run"]


@pytest.fixture
def loaded(make_run):
    return load_run(make_run().path)


@pytest.fixture
def traced(loaded, tmp_path):
    """(loaded run, its validation split, a trace of 400 of its tokens)."""
    how = Pass(loaded.recipe.data.sequence_length, 4, end_of_text_id(loaded.tokenizer), 400)
    with open_text(loaded) as text:
        yield loaded, text.split, record(loaded.model, text.split, how, tmp_path / "t", {})
