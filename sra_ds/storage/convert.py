"""A run's checkpoint written anew as a run directory of its own.

    reshard      the files another layout would have written; optimizer state included
    consolidate  one file of whole weights, for sharing; nothing to resume from

A run resumes at any layout without being converted: resharding spares many processes reading each
other's files, and fixes the layout in the recipe.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sra_ds.config import Recipe, dump_recipe
from sra_ds.config.model import MoEChannelConfig
from sra_ds.errors import ConfigError
from sra_ds.model.language_model import build_model
from sra_ds.moe.placement import Placement
from sra_ds.storage import checkpoint
from sra_ds.storage.checkpoint import OPTIMIZER, TRAINER, WEIGHTS, Contents, Layout
from sra_ds.storage.fragments import Fragment, Range, TensorFiles
from sra_ds.storage.held import held_ranges
from sra_ds.storage.run_dir import RunDir, read_json, refuse_overwriting, write_atomically


def reshard(run: RunDir, out: RunDir, layout: Layout) -> dict[str, Any]:
    """The newest complete checkpoint as `layout` would have written it; returns where. Raises
    `ConfigError` for an impossible layout and `CheckpointError` for a broken checkpoint."""
    recipe = _with_expert_parallelism(run.recipe(), layout)
    folder, problems = checkpoint.first_complete(checkpoint.candidates(run.checkpoints))
    target = _new_run(run, out, recipe) / folder.name
    files = {stem: checkpoint.open_tensors(folder, stem) for stem in (WEIGHTS, OPTIMIZER)}
    trainer, facts = read_json(folder / TRAINER), _facts(folder)

    def contents() -> Iterator[Contents]:
        for rank in tqdm(range(layout.world_size), "processes"):
            size = layout.expert_parallel_size
            ranges = held_ranges(build_model(recipe, "meta", Placement("local", size, rank % size)))
            tensors = {stem: _shares(files[stem], ranges, rank, layout) for stem in files}
            yield Contents(tensors, trainer, facts, _expert_ids(recipe, rank))

    checkpoint.save_parts(target, contents(), layout)
    checkpoint.point_latest_at(target)
    return {"run": str(out.path), "checkpoint": target.name, "passed_over": problems}


def consolidate(run: RunDir, out: RunDir, which: str = "best") -> dict[str, Any]:
    """The weights of a checkpoint in one file of whole tensors; returns where."""
    folder = checkpoint.choose(run.checkpoints, which)
    weights, trainer = checkpoint.open_weights(folder)
    recipe = _with_expert_parallelism(run.recipe(), Layout())
    target = _new_run(run, out, recipe) / str(trainer["step"])
    whole = {name: weights.whole_fragment(name) for name in tqdm(weights.names, "tensors")}
    contents = Contents({WEIGHTS: whole}, trainer, _facts(folder), _expert_ids(recipe, 0))
    checkpoint.save_parts(target, [contents], Layout())
    checkpoint.point_latest_at(target)
    return {"run": str(out.path), "weights": str(target / f"{WEIGHTS}.safetensors")}


def parse_layout(text: str) -> Layout:
    """`ep=2,world=4,zero=2`; raises `ConfigError`."""
    names = {"ep": "expert_parallel_size", "world": "world_size", "zero": "zero_stage"}
    values = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in names or not value.isdecimal():
            raise ConfigError(f"--reshard {text}: expected ep=N,world=M,zero=0|1|2|3")
        values[names[key]] = int(value)
    layout = Layout(**values)
    if layout.world_size < 1 or layout.expert_parallel_size < 1 or layout.zero_stage > 3:
        raise ConfigError(f"--reshard {text}: ep and world are at least 1, zero is 0 to 3")
    if layout.world_size % layout.expert_parallel_size:
        raise ConfigError(f"--reshard {text}: ep does not divide world")
    return layout


def _with_expert_parallelism(recipe: Recipe, layout: Layout) -> Recipe:
    channel, size = recipe.model.channel, layout.expert_parallel_size
    if size > 1:
        experts = channel.experts if isinstance(channel, MoEChannelConfig) else 0
        if not experts or experts % size:
            raise ConfigError(f"ep={size} does not divide the model's {experts} experts")
        channel = channel.model_copy(update={"backend": "deepspeed"})
    model = recipe.model.model_copy(update={"channel": channel})
    parallel = recipe.parallel.model_copy(update={"expert_parallel_size": size})
    return recipe.model_copy(update={"model": model, "parallel": parallel})


def _new_run(run: RunDir, out: RunDir, recipe: Recipe) -> Path:
    """A run directory with the files that describe the old one; its checkpoints' folder."""
    refuse_overwriting(out)
    out.checkpoints.mkdir(parents=True, exist_ok=True)
    for source, copy in (
        (run.tokenizer_file, out.tokenizer_file),
        (run.environment_file, out.environment_file),
        (run.metrics_file, out.metrics_file),
    ):
        if source.is_file():
            shutil.copyfile(source, copy)
    write_atomically(out.recipe_file, dump_recipe(recipe))
    return out.checkpoints


def _facts(folder: Path) -> dict[str, Any]:
    """What a manifest says besides layout and files."""
    own = ("schema_version", "layout", "files")
    facts = {k: v for k, v in checkpoint.read_manifest(folder).items() if k not in own}
    return {**facts, "converted": time.time()}


def _expert_ids(recipe: Recipe, rank: int) -> range | None:
    channel, size = recipe.model.channel, recipe.parallel.expert_parallel_size
    if not isinstance(channel, MoEChannelConfig):
        return None
    return Placement("local", size, rank % size).expert_ids(channel.experts)


def _shares(
    files: TensorFiles, ranges: dict[str, Range], rank: int, layout: Layout
) -> dict[str, Fragment]:
    """What one process writes: of a weight and its optimizer state the range it holds, shared among
    those that hold the same; of a buffer or a step count everything, once."""
    shares = {}
    for path in files.names:
        name = path if path in ranges else path.rsplit("/", 1)[0]
        shape = files.shape(path)
        if shape != ranges[name].shape:  # a step count
            share = Range(shape, 0, 1) if rank == 0 else None
        else:
            share = _share(ranges[name], rank, layout)
        if share is not None:
            values = torch.empty(share.stop - share.start)
            files.read_into(path, share.start, values)
            shares[path] = Fragment(share, values)
    return shares


def _share(held: Range, rank: int, layout: Layout) -> Range | None:
    """The part of a held range that this process writes: from ZeRO stage 1 on an equal share among the
    processes that hold it, at stage 0 all of it, by the first of them."""
    holders = layout.world_size // held.parts
    number = rank // held.parts
    if layout.zero_stage == 0:
        return held if number == 0 else None
    size = held.stop - held.start
    start, stop = size * number // holders, size * (number + 1) // holders
    return Range(held.shape, held.start + start, held.start + stop) if start < stop else None
