"""A run with sparse channels, written anew with nothing but its live weights, and what that changes.

    whole matrices with zeros (storage=masked)  ->  live values in blocks (storage=blocks)

The model computes the same; the new run holds weights only, as after `--consolidate`. Size, speed and
perplexity are measured before and after, in turns on the same text.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sra_ds.config import Recipe
from sra_ds.config.model import PrimeMaskedChannelConfig
from sra_ds.data.shards import TokenSplit
from sra_ds.errors import ConfigError
from sra_ds.evaluation.perplexity import evaluate
from sra_ds.evaluation.run import Scoring, setting
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import LoadedRun, load_run
from sra_ds.model.channels.prime_masked import MaskedLinear
from sra_ds.storage import checkpoint
from sra_ds.storage.checkpoint import WEIGHTS, Contents, Layout
from sra_ds.storage.convert import describe
from sra_ds.storage.fragments import whole_tensor
from sra_ds.storage.run_dir import RunDir, complete_or_absent

ROUNDS, TIMED_TOKENS = 5, 20_000


def compress(run: RunDir, out: RunDir, which: str, text: Path | None = None) -> dict[str, Any]:
    """Write the compressed run and compare it on the validation split, or on a file or folder. Raises
    `ConfigError` for a run without whole matrices under a mask, or whose mask has no blocks."""
    loaded = load_run(run.path, which)
    recipe = compressed_recipe(loaded.recipe)
    with open_text(loaded, "valid", text) as found:
        write(loaded, recipe, out)
        compared = measure(loaded, load_run(out.path, "latest"), found.split)
        return {"run": str(out.path), "text": found.label, **compared}


def write(loaded: LoadedRun, recipe: Recipe, out: RunDir) -> None:
    """The compressed run, complete or absent."""
    with complete_or_absent(out) as new:
        folder = new.checkpoints / str(loaded.trainer["step"])
        tensors = {n: whole_tensor(t) for n, t in live_weights(loaded).items()}
        facts = {"step": loaded.trainer["step"], "tokens": loaded.trainer["tokens"]}
        contents = Contents({WEIGHTS: tensors}, loaded.trainer, facts)
        checkpoint.save_parts(folder, [contents], Layout())
        checkpoint.point_latest_at(folder)
        describe(loaded.run, new, recipe)


def compressed_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the compressed run."""
    channel = recipe.model.channel
    if not isinstance(channel, PrimeMaskedChannelConfig):
        raise ConfigError(f"--compress needs model.channel.kind=prime_masked, not {channel.kind}")
    if channel.storage == "blocks":
        raise ConfigError("the run stores its live weights in blocks already")
    if channel.pattern == "random":
        raise ConfigError("a random mask has no blocks: runs with pattern=random stay as they are")
    channel = channel.model_copy(update={"storage": "blocks"})
    model = recipe.model.model_copy(update={"channel": channel})
    return recipe.model_copy(update={"model": model})


def live_weights(loaded: LoadedRun) -> dict[str, Tensor]:
    """The model's tensors under the names of the compressed model."""
    tensors = dict(loaded.model.state_dict())
    for name, module in loaded.model.named_modules():
        if isinstance(module, MaskedLinear):
            weight = tensors.pop(f"{name}.weight")
            tensors[f"{name}.values"] = weight[module.mask]
    return tensors


def measure(before: LoadedRun, after: LoadedRun, split: TokenSplit) -> dict[str, Any]:
    """Bytes of the weights, perplexity of the whole split and tokens per second of both."""
    runs = {"before": before, "after": after}
    results = {name: score(loaded, split) for name, loaded in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, loaded in runs.items():
            start = time.perf_counter()
            scored = score(loaded, split, TIMED_TOKENS)["tokens"]
            seconds[name].append((time.perf_counter() - start) / scored)
    for name, found in results.items():
        found["tokens_per_second"] = 1 / statistics.median(seconds[name])
        found["weight_bytes"] = weight_bytes(runs[name])
    pairs = zip(seconds["before"], seconds["after"], strict=True)
    return {**results, "speed_ratio": statistics.median(old / new for old, new in pairs)}


def score(loaded: LoadedRun, split: TokenSplit, tokens: int = 0) -> dict[str, Any]:
    """Perplexity over the split, or its first documents up to so many tokens."""
    how = setting(loaded, Scoring(), torch.device("cpu"))
    found = evaluate(loaded.model, split, how, tokens, progress=not tokens)
    assert found is not None
    summary = found.summary()
    return {name: summary[name] for name in ("token_perplexity", "nll_per_token", "tokens")}


def weight_bytes(loaded: LoadedRun) -> int:
    """Of the checkpoint's files of weights."""
    folder: Path = loaded.checkpoint
    return sum(path.stat().st_size for path in folder.glob(f"{WEIGHTS}*.safetensors"))
