"""Checkpoints that are complete or absent.

    checkpoints/<step>/manifest.json      layout, and size and hash of every other file
                       model.safetensors  all weights and buffers, for everything but resuming
                       trainer.json       step, controllers, best result
                       deepspeed/         DeepSpeed's own files, one part per process
    checkpoints/best -> best-<step>/      the same without deepspeed/, a link
    checkpoints/latest                    name of the newest complete one

Everything is written into `<name>.partial`, counted and hashed, and renamed; link and name are replaced
atomically after that. DeepSpeed reads its files with
pickle, so they are opened only from the run's own directory and after their hashes matched.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sra_ds.data.tokenizer import file_sha256
from sra_ds.errors import CheckpointError
from sra_ds.training.run_dir import read_json, write_atomically

SCHEMA_VERSION = 1
WEIGHTS, TRAINER, MANIFEST, ENGINE = (
    "model.safetensors",
    "trainer.json",
    "manifest.json",
    "deepspeed",
)


class Layout(NamedTuple):
    """What DeepSpeed's files depend on."""

    world_size: int
    zero_stage: int


def save_checkpoint(
    folder: Path,
    weights: dict[str, Tensor],
    trainer: dict[str, Any],
    layout: Layout,
    engine: Any | None = None,
) -> None:
    """Write one checkpoint folder; collective. Without `engine` it holds weights only.

    Raises `CheckpointError` if a part is missing afterwards; nothing complete is touched then.
    """
    partial = folder.with_name(folder.name + ".partial")
    first = is_first()
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    try:
        if engine is not None:
            engine.save_checkpoint(str(partial), tag=ENGINE, save_latest=False)
        _barrier()
        if first:
            save_file({n: t.contiguous() for n, t in weights.items()}, partial / WEIGHTS)
            write_atomically(partial / TRAINER, json.dumps(trainer))
            _write_manifest(partial, layout, with_engine=engine is not None)
            _replace_folder(partial, folder)
    except (OSError, RuntimeError, SafetensorError, CheckpointError):
        shutil.rmtree(partial, ignore_errors=True)  # give its space back
        raise
    _barrier()


def point_latest_at(folder: Path) -> None:
    """Name the newest complete checkpoint; rank 0 only."""
    write_atomically(folder.parent / "latest", folder.name)


def point_best_at(folder: Path) -> None:
    """Make `best` a link to the folder and delete the one it replaces; rank 0 only."""
    link = folder.parent / "best.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, folder.parent / "best")
    for older in folder.parent.glob("best-*"):
        if older.name != folder.name:
            shutil.rmtree(older, ignore_errors=True)


def prune(checkpoints: Path, keep: int, newest: int) -> None:
    """Delete all but the last `keep` checkpoints up to step `newest`, those of later steps that a
    damaged run left, and what a crash left half-written."""
    for leftover in checkpoints.glob("*.partial"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink()
    steps = numbered(checkpoints)
    kept = [step for step in steps if step <= newest][-keep:]
    for step in set(steps).difference(kept):
        shutil.rmtree(checkpoints / str(step), ignore_errors=True)


def numbered(checkpoints: Path) -> list[int]:
    """Steps of the checkpoint folders, rising."""
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())


def verify(folder: Path, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file (or those named) matches it; raises
    `CheckpointError`."""
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder}: schema version {manifest.get('schema_version')} is unknown"
        )
    for name, entry in manifest["files"].items():
        if only and name not in only:
            continue
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is damaged (it differs from the manifest)")
    return manifest


def newest_complete(checkpoints: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint `latest` names, or else the newest one that verifies; with the reasons why newer
    ones were passed over."""
    latest = checkpoints / "latest"
    named = latest.read_text("utf-8").strip() if latest.is_file() else ""
    names = [str(step) for step in reversed(numbered(checkpoints))]
    if named in names:
        names = [named, *(name for name in names if name != named)]
    problems: list[str] = []
    for name in names:
        try:
            return checkpoints / name, verify(checkpoints / name), problems
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError("; ".join([f"no complete checkpoint in {checkpoints}", *problems]))


def require_layout(manifest: dict[str, Any], layout: Layout, folder: Path) -> None:
    """DeepSpeed's files fit only the number of processes and ZeRO stage they were written with."""
    saved = Layout(**manifest["layout"])
    if saved != layout:
        raise CheckpointError(
            f"{folder} was written by {saved.world_size} process(es) at ZeRO stage {saved.zero_stage}, "
            f"this run has {layout.world_size} at stage {layout.zero_stage}; resume with that layout, "
            "or start anew from its weights with --init-from"
        )


def load_engine(engine: Any, folder: Path) -> dict[str, Any]:
    """Resume the engine from a verified checkpoint; returns the trainer's state. Collective."""
    loaded, _ = engine.load_checkpoint(str(folder), tag=ENGINE)
    if loaded is None:
        raise CheckpointError(f"{folder}: DeepSpeed could not load its files")
    trainer: dict[str, Any] = read_json(folder / TRAINER)
    return trainer


def load_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, trainer state) of a verified checkpoint, without DeepSpeed and without pickle."""
    verify(folder, only=(WEIGHTS, TRAINER))
    try:
        return load_file(folder / WEIGHTS), read_json(folder / TRAINER)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {error}") from None


def choose(checkpoints: Path, which: str = "best") -> Path:
    """`best` if there is one, else the newest complete; or a step, or `latest`."""
    if which == "best":
        if (checkpoints / "best" / MANIFEST).is_file():
            return checkpoints / "best"
        which = "latest"
    if which == "latest":
        return newest_complete(checkpoints)[0]
    if not (checkpoints / which / MANIFEST).is_file():
        steps = ", ".join(map(str, numbered(checkpoints))) or "none"
        raise CheckpointError(f"{checkpoints / which} does not exist; steps kept: {steps}")
    return checkpoints / which


def _write_manifest(folder: Path, layout: Layout, with_engine: bool) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    expected = {
        "_optim_states.pt": layout.world_size if layout.zero_stage > 0 else 0,
        "_model_states.pt": layout.world_size if layout.zero_stage == 3 else 1,
    }
    for ending, count in expected.items() if with_engine else ():
        written = sum(path.name.endswith(ending) for path in files)
        if written != count:
            raise CheckpointError(f"{folder}: {written} *{ending} written, expected {count}")
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    }
    manifest = {"schema_version": SCHEMA_VERSION, "layout": layout._asdict(), "files": entries}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))


def _replace_folder(partial: Path, folder: Path) -> None:
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step
    os.replace(partial, folder)


def is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
