"""A trained run, opened for evaluation, generation or analysis: recipe, weights, tokenizer."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from sra_ds.config import Recipe
from sra_ds.data.tokenizer import load_tokenizer
from sra_ds.errors import CheckpointError
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.storage.checkpoint import find, open_weights
from sra_ds.storage.held import held_ranges
from sra_ds.storage.run_dir import RunDir, open_run


class LoadedRun(NamedTuple):
    """`trainer` is the checkpoint's trainer state: step, tokens, experts per token."""

    run: RunDir
    recipe: Recipe
    model: LanguageModel
    tokenizer: Tokenizer
    checkpoint: Path
    trainer: dict[str, Any]


def load_run(path: Path, which: str = "best", device: str | torch.device = "cpu") -> LoadedRun:
    """The model of a run in eval mode, in float32.

    `which`: `best` (falls back to the newest), `latest`, or a step. Raises `CheckpointError`.
    """
    run = open_run(path)
    recipe = run.recipe()
    folder, _, passed_over = find(run.checkpoints, which)
    for problem in passed_over:
        print(f"passing over a broken checkpoint: {problem}", file=sys.stderr)
    model = build_model(recipe)
    trainer = load_weights_into(model, folder)
    for router in model.routers():
        router.top_k = trainer["top_k"]
    tokenizer = load_tokenizer(run.tokenizer_file, recipe.data.tokenizer.vocab_size)
    return LoadedRun(run, recipe, model.to(device).eval(), tokenizer, folder, trainer)


def load_weights_into(model: LanguageModel, folder: Path) -> dict[str, Any]:
    """Fill a model, or the part of it this process holds, from a checkpoint; every tensor must be there
    and fit. Returns the trainer state."""
    files, trainer = open_weights(folder)
    held, saved = held_ranges(model), files.names
    wrong = [n for n, part in held.items() if n not in saved or files.shape(n) != part.shape]
    wrong += [n for n in saved if n not in held]
    if wrong:
        raise CheckpointError(
            f"{folder} is of another model: {wrong[0]} differs ({len(wrong)} in all)"
        )
    for name, tensor in model.state_dict().items():
        files.read_into(name, held[name].start, tensor.view(-1))
    return trainer
