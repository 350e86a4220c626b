"""Saved runs of tiny models, their analysis as a command, and what most tests of analysis need."""

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import commands
from browser import chromium
from saved_runs import call, corpus, make_run, random_model, save_run
from sra_ds.config import Recipe
from sra_ds.config.data import TextConfig
from sra_ds.data.shards import TokenCorpus
from sra_ds.data.tokenizer import end_of_text_id

__all__ = ["call", "chromium", "corpus", "make_run"]


class Analysed(NamedTuple):
    """What `tools/analyze.py --json` printed of two runs, and where it wrote."""

    result: CompletedProcess[str]
    out: Path
    runs: list[Path]


@pytest.fixture(scope="session")
def analysed(
    tiny_recipe: Callable[..., Recipe],
    corpus: tuple[TextConfig, TokenCorpus],
    tmp_path_factory: pytest.TempPathFactory,
) -> Analysed:
    """A cosine and a linear router on text with everything that HTML must escape."""
    folder, runs = tmp_path_factory.mktemp("analysed"), []
    torch.manual_seed(0)
    for family in ("moe-cosine", "moe-linear"):
        overlay = {"name": family, "data": corpus[0].model_dump(mode="json")}
        recipe = tiny_recipe(family, overlay)
        runs.append(save_run(folder / family, recipe, corpus[1], random_model(recipe)).path)
    text = folder / "page.md"
    text.write_text(
        "<b>bold</b> & \"quoted\" <script>alert('x')</script> $x_1$ | caf\u00e9.\n" * 40
    )
    command = [sys.executable, commands.ROOT / "tools" / "analyze.py", "--run", runs[0]]
    options = ["--text", text, "--sweep-tokens", 300, "--out", folder / "out", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        result = commands.call(*command, "--against", runs[1], *options)
    return Analysed(result, folder / "out", runs)


@pytest.fixture
def trace_of() -> Callable[..., Any]:
    """`trace_of(tokenizer, texts, tokens)`: the part of a trace that words are read from, of no more
    than `tokens` tokens."""

    def make(tokenizer: Tokenizer, texts: list[str], tokens: int = 0) -> Any:
        mark, ids, starts = end_of_text_id(tokenizer), [], []
        for text in texts:
            starts.append(len(ids))
            ids += [mark, *tokenizer.encode(text).ids]
        ids = ids[: tokens or len(ids)]
        kinds = [("start", "i8"), ("domain", "u2")]
        documents = np.array([(s, 0) for s in starts if s < len(ids)], kinds)
        tokens_N = np.array(ids, np.uint16)
        return SimpleNamespace(tokens=len(ids), tokens_N=tokens_N, documents=documents)

    return make
