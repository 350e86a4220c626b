"""A run's checkpoint written anew as a run directory of its own.

    reshard      the files another layout would have written; optimizer state included
    consolidate  one file of whole weights, for sharing; nothing to resume from

A run resumes at any layout without being converted: resharding spares many processes reading each
other's files, and fixes the layout in the recipe. The output is complete or absent.
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
from sra_ds.errors import CheckpointError, ConfigError
from sra_ds.model.language_model import build_model
from sra_ds.moe.placement import Placement
from sra_ds.storage import checkpoint
from sra_ds.storage.checkpoint import OPTIMIZER, WEIGHTS, Chosen, Contents, Layout
from sra_ds.storage.fragments import Fragment, Range, TensorFiles
from sra_ds.storage.held import held_ranges
from sra_ds.storage.run_dir import RunDir, complete_or_absent, write_atomically

MOST_PROCESSES = 4096
"""Each process of a layout writes files of its own, and is played by this one."""


def reshard(run: RunDir, out: RunDir, layout: Layout, which: str = "latest") -> dict[str, Any]:
    """The newest complete checkpoint, or that of a step, as `layout` would have written it; returns
    where. Raises `ConfigError` for an impossible layout and `CheckpointError` for a broken checkpoint."""
    if which == "best":
        raise ConfigError(
            "--checkpoint best holds no optimizer state to reshard; choose latest or a step"
        )
    recipe = _with_expert_parallelism(run.recipe(), layout)
    with complete_or_absent(out) as new:
        chosen = checkpoint.find(run.checkpoints, which)
        if which != "latest":  # which is verified by being found
            checkpoint.verify(chosen.folder)
        step = _write_resharded(chosen.folder, new, recipe, layout)
        describe(run, new, recipe)
    return {"run": str(out.path), **_told(chosen, step)}


def _write_resharded(folder: Path, new: RunDir, recipe: Recipe, layout: Layout) -> str:
    """The checkpoint of a new run; its step."""
    files = {stem: checkpoint.open_tensors(folder, stem) for stem in (WEIGHTS, OPTIMIZER)}
    trainer, facts = checkpoint.read_trainer(folder), _facts(folder)
    step = _step_of(folder, trainer)
    _require_fit(folder, files, held_ranges(build_model(recipe, "meta")))

    def contents() -> Iterator[Contents]:
        for rank in tqdm(range(layout.world_size), "processes"):
            size = layout.expert_parallel_size
            ranges = held_ranges(build_model(recipe, "meta", Placement("local", size, rank % size)))
            tensors = {stem: _shares(files[stem], ranges, rank, layout) for stem in files}
            yield Contents(tensors, trainer, facts, _expert_ids(recipe, rank))

    checkpoint.save_parts(new.checkpoints / step, contents(), layout)
    checkpoint.point_latest_at(new.checkpoints / step)
    return step


def consolidate(run: RunDir, out: RunDir, which: str = "best") -> dict[str, Any]:
    """The weights of a checkpoint in one file of whole tensors; returns where."""
    recipe = _with_expert_parallelism(run.recipe(), Layout())
    with complete_or_absent(out) as new:
        chosen = checkpoint.find(run.checkpoints, which)
        weights, trainer = checkpoint.open_weights(chosen.folder)
        step, facts = _step_of(chosen.folder, trainer), _facts(chosen.folder)
        whole = {name: weights.whole_fragment(name) for name in tqdm(weights.names, "tensors")}
        contents = Contents({WEIGHTS: whole}, trainer, facts, _expert_ids(recipe, 0))
        checkpoint.save_parts(new.checkpoints / step, [contents], Layout())
        checkpoint.point_latest_at(new.checkpoints / step)
        describe(run, new, recipe)
    file = out.checkpoints / step / f"{WEIGHTS}.safetensors"
    return {"run": str(out.path), "weights": str(file), **_told(chosen, step)}


def parse_layout(text: str) -> Layout:
    """`ep=2,world=4,zero=2`, what is left out being 1, 1 and 0; raises `ConfigError`."""
    names = {"ep": "expert_parallel_size", "world": "world_size", "zero": "zero_stage"}
    values: dict[str, int] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in names or not value.isdecimal() or len(value) > 9:
            raise ConfigError(f"--reshard {text}: expected ep=N,world=M,zero=0|1|2|3")
        if names[key] in values:
            raise ConfigError(f"--reshard {text}: {key} is given twice; leave one out")
        values[names[key]] = int(value)
    layout = Layout(**values)
    world, size = layout.world_size, layout.expert_parallel_size
    if world < 1 or size < 1 or layout.zero_stage > 3:
        raise ConfigError(f"--reshard {text}: ep and world are at least 1, zero is 0 to 3")
    if world > MOST_PROCESSES:
        raise ConfigError(f"--reshard {text}: world is at most {MOST_PROCESSES} processes")
    if world % size:
        remedy = "change" if "world_size" in values else "add"
        raise ConfigError(
            f"--reshard {text}: ep={size} does not divide world={world}; "
            f"{remedy} world=N, a multiple of {size}"
        )
    return layout


def _told(chosen: Chosen, step: str) -> dict[str, Any]:
    """What a result says of the checkpoint it came from."""
    return {"checkpoint": step, "chosen": chosen.reason, "passed_over": chosen.passed_over}


def _step_of(folder: Path, trainer: dict[str, Any]) -> str:
    step = trainer.get("step")
    if not isinstance(step, int):
        raise CheckpointError(f"{folder / checkpoint.TRAINER} is damaged (it tells no step)")
    return str(step)


def _require_fit(folder: Path, files: dict[str, TensorFiles], ranges: dict[str, Range]) -> None:
    """Raise `CheckpointError` for a checkpoint of another model than the recipe's."""
    weights = files[WEIGHTS]
    wrong = [n for n in ranges if n not in weights.names or weights.shape(n) != ranges[n].shape]
    wrong += [n for n in weights.names if n not in ranges]
    wrong += [n for n in files[OPTIMIZER].names if n.rpartition("/")[0] not in ranges]
    if wrong:
        raise CheckpointError(
            f"{folder} is not of the recipe beside it: {wrong[0]} differs ({len(wrong)} in all)"
        )


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


def describe(run: RunDir, out: RunDir, recipe: Recipe) -> None:
    """The files that describe the old run, in the new one."""
    for source, copy in (
        (run.tokenizer_file, out.tokenizer_file),
        (run.environment_file, out.environment_file),
        (run.metrics_file, out.metrics_file),
    ):
        if source.is_file():
            shutil.copyfile(source, copy)
    write_atomically(out.recipe_file, dump_recipe(recipe))


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
