"""Saved runs of tiny models with a corpus of their own, made without training; tools in this process."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from commands import ROOT, write_corpus
from references import randomise
from sra_ds.config import Recipe
from sra_ds.config.data import TextConfig
from sra_ds.data.prepare import prepare
from sra_ds.data.shards import TokenCorpus
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.storage import checkpoint
from sra_ds.storage.checkpoint import WEIGHTS, Contents, Layout
from sra_ds.storage.fragments import whole_tensor
from sra_ds.storage.run_dir import RunDir

VOCABULARY = 320
"""Rows of the embedding; the tokenizer of the tiny corpus fills fewer."""
STEP = 7
MakeRun = Callable[..., RunDir]


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def tree(self) -> dict[str, Any]:
        """Its JSON."""
        assert self.code == 0, self.err
        found: dict[str, Any] = json.loads(self.out)
        return found

    def refused(self, *words: str) -> None:
        """Whether it ended with one line of error that says all of this."""
        assert self.code == 2 and len(self.err.splitlines()) == 1, self
        assert all(word in self.err for word in words), self.err


Call = Callable[..., Result]


@cache
def tool(name: str) -> ModuleType:
    """A file of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """`call(tool, argument, ...)` in this process."""

    def act(name: str, *arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with patch.dict(
            os.environ, {"OMP_NUM_THREADS": "1"}
        ):  # what it sets is not for later tests
            try:
                code = tool(name).main()
            except SystemExit as error:
                code = error.code
        return Result(code, *capfd.readouterr())

    return act


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextConfig, TokenCorpus]:
    """A prepared corpus of 60 documents and the configuration it was made from."""
    folder = tmp_path_factory.mktemp("corpus")
    text = write_corpus(folder / "text.jsonl", documents=60)
    config = TextConfig.model_validate(
        {
            "train": [str(text)],
            "held_out": 0.2,
            "sequence_length": 16,
            "directory": str(folder),
            "tokenizer": {"vocab_size": VOCABULARY, "train_bytes": 200},
        }
    )
    return config, prepare(config, progress=False)


@pytest.fixture
def make_run(
    tiny_recipe: Callable[..., Recipe],
    corpus: tuple[TextConfig, TokenCorpus],
    tmp_path: Path,
) -> MakeRun:
    """`make_run(family, overlay, name)`: a run of random weights with one checkpoint."""
    config, prepared = corpus

    def make(
        family: str = "moe-cosine",
        overlay: dict[str, Any] | None = None,
        name: str = "run",
    ) -> RunDir:
        overlay = {"data": config.model_dump(mode="json"), **(overlay or {})}
        recipe = tiny_recipe(family, overlay)
        return save_run(tmp_path / name, recipe, prepared, random_model(recipe))

    return make


@torch.no_grad()
def random_model(recipe: Recipe) -> LanguageModel:
    """Weights so large that its texts are no repetition of one token."""
    model = build_model(recipe)
    randomise(model)
    for parameter in model.final_norm.parameters():
        parameter.mul_(0.05)
    for router in model.routers():
        if hasattr(router, "selection_bias_E"):
            router.selection_bias_E.normal_(0, 0.1)
    return model


def save_run(path: Path, recipe: Recipe, corpus: TokenCorpus, model: LanguageModel) -> RunDir:
    """A run directory with one checkpoint, as training leaves it."""
    run = RunDir(path)
    facts = {
        "corpus_folder": str(corpus.folder),
        "corpus_fingerprint": corpus.fingerprint,
        "tokenizer_sha256": corpus.manifest["tokenizer"]["sha256"],
    }
    run.write_start(recipe, {}, facts)
    run.tokenizer_file.write_bytes(corpus.tokenizer_file.read_bytes())
    save_checkpoint(run, recipe, model, STEP)
    checkpoint.point_latest_at(run.checkpoints / str(STEP))
    return run


def save_checkpoint(run: RunDir, recipe: Recipe, model: LanguageModel, step: int) -> None:
    """The weights of one step."""
    weights = {name: whole_tensor(tensor) for name, tensor in model.state_dict().items()}
    top_k = getattr(recipe.model.channel, "top_k", None)
    trainer = {"step": step, "tokens": 64 * step, "top_k": top_k}
    contents = Contents({WEIGHTS: weights}, trainer, {"step": step})
    checkpoint.save_parts(run.checkpoints / str(step), [contents], Layout())
