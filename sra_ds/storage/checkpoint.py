"""Checkpoints that are complete or absent, and the same whatever layout wrote them.

    checkpoints/<step>/manifest.json            layout, tokens, dead experts; size and hash of each file
                       model*.safetensors       weights (float32 masters) and buffers
                       optimizer*.safetensors   optimizer state
                       trainer.json             step, controllers, best result
    checkpoints/best -> best-<step>/            the same without optimizer state, a link
    checkpoints/latest                          name of the newest complete one

Each process writes the fragments it holds, with the names and positions of whole tensors, so a run goes
on at any number of processes, ZeRO stage and expert parallelism. Everything is written into
`<name>.partial`, counted and hashed, and renamed; link and name are replaced atomically after that.
Nothing is pickled.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sra_ds.errors import CheckpointError
from sra_ds.files import file_sha256
from sra_ds.processes import from_all, rank, together, world_size
from sra_ds.storage.fragments import Fragment, TensorFiles, write_fragments
from sra_ds.storage.run_dir import read_json_object, write_atomically

SCHEMA_VERSION = 2
TRAINER, MANIFEST = "trainer.json", "manifest.json"
WEIGHTS, OPTIMIZER = "model", "optimizer"


Entries = dict[str, dict[str, Any]]
"""Size, hash and experts held by file name."""


class Layout(NamedTuple):
    """How the processes that wrote a checkpoint shared the work."""

    world_size: int = 1
    zero_stage: int = 0
    expert_parallel_size: int = 1


class Chosen(NamedTuple):
    """A checkpoint that was chosen, why, and what was wrong with those passed over for it."""

    folder: Path
    reason: str
    passed_over: list[str]


class Contents(NamedTuple):
    """What this process puts into a checkpoint; `facts` and `trainer` count on rank 0 only."""

    tensors: dict[str, dict[str, Fragment]]
    """Fragments by file stem, `WEIGHTS` and `OPTIMIZER`."""
    trainer: dict[str, Any]
    facts: dict[str, Any]
    """Further entries of the manifest."""
    expert_ids: range | None = None
    """Experts of each layer whose weights this process writes."""


def save_checkpoint(folder: Path, contents: Contents, layout: Layout) -> None:
    """Write one checkpoint folder; collective.

    Raises `CheckpointError` on every process if any of them failed; nothing complete is touched then.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        together(lambda: _new_folder(partial), CheckpointError, only_first=True)
        own = together(
            lambda: _write_tensors(partial, contents, rank(), world_size()), CheckpointError
        )
        parts = from_all(own or {})
        together(
            lambda: _complete(partial, folder, contents, layout, parts),
            CheckpointError,
            only_first=True,
        )
    except Exception:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # give its space back
        raise


def save_parts(folder: Path, contents: Iterable[Contents], layout: Layout) -> None:
    """Write alone what the processes of a layout would have written together, one after the other."""
    partial = folder.with_name(folder.name + ".partial")
    _new_folder(partial)
    parts = []
    for number, own in enumerate(contents):
        parts.append(_write_tensors(partial, own, number, layout.world_size))
    _complete(partial, folder, own, layout, parts)


def _new_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_tensors(folder: Path, contents: Contents, rank: int, world: int) -> Entries:
    """One process's files; their entries for the manifest."""
    files: Entries = {}
    for stem, fragments in contents.tensors.items():
        if fragments:
            path = folder / _file_name(stem, rank, world)
            write_fragments(path, fragments)
            files[path.name] = _entry(path)
            if stem == WEIGHTS and contents.expert_ids is not None:
                ids = contents.expert_ids
                files[path.name]["experts"] = {"first": ids.start, "count": len(ids)}
    return files


def _complete(
    partial: Path, folder: Path, contents: Contents, layout: Layout, parts: list[Entries]
) -> None:
    """Add trainer state and manifest, and give the folder its name; rank 0 only."""
    write_atomically(partial / TRAINER, json.dumps(contents.trainer))
    files = {name: entry for part in parts for name, entry in part.items()}
    files[TRAINER] = _entry(partial / TRAINER)
    for name, entry in files.items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{path}: rank 0 does not see what another process wrote")
    layout_now = {"schema_version": SCHEMA_VERSION, "layout": layout._asdict()}
    manifest = {**layout_now, **contents.facts, "files": files}
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1))
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step
    os.replace(partial, folder)


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
    names = (path.name for path in checkpoints.glob("*"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint of this schema; raises `CheckpointError`."""
    if os.path.isfile(folder):  # unlike Path.is_file never an OSError
        raise CheckpointError(f"{folder} is neither a checkpoint's folder nor the name of one")
    manifest: dict[str, Any] = read_json_object(folder / MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder}: schema version {manifest.get('schema_version')!r} is unknown"
        )
    files = manifest.get("files")
    names = files.keys() if isinstance(files, dict) else set()
    if TRAINER not in names or not any(_is_of(name, WEIGHTS) for name in names):
        raise CheckpointError(f"{folder / MANIFEST} is damaged (it does not list the files)")
    for name, entry in manifest["files"].items():
        known = entry.keys() if isinstance(entry, dict) else set()
        if Path(name).name != name or not known >= {"bytes", "sha256"}:
            raise CheckpointError(f"{folder / MANIFEST} is damaged (at the file {name!r})")
    return manifest


def read_trainer(folder: Path) -> dict[str, Any]:
    """The trainer state of a checkpoint; raises `CheckpointError`."""
    return read_json_object(folder / TRAINER)


def verify(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """The manifest of a checkpoint whose every wanted file matches it; raises `CheckpointError`."""
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        if wanted(name):
            _verify_file(folder / name, entry)
    if wanted(TRAINER):
        read_trainer(folder)
    return manifest


def _verify_file(path: Path, entry: dict[str, Any]) -> None:
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is damaged (it differs from the manifest)")
    except OSError as error:
        raise CheckpointError(f"{path} is not readable ({error.strerror})") from None


def verify_together(folder: Path) -> None:
    """Every process checks its share of the files; all raise `CheckpointError` if one finds fault.
    Collective."""

    def own_share() -> None:
        files = sorted(read_manifest(folder)["files"])
        verify(folder, set(files[rank() :: world_size()]).__contains__)

    together(own_share, CheckpointError)


def candidates(checkpoints: Path) -> list[Path]:
    """Folders to go on from: the one `latest` names, then from the newest to the oldest. An unreadable
    `latest` comes first itself: it passes no check, which tells of it."""
    latest = checkpoints / "latest"
    names = [str(step) for step in reversed(numbered(checkpoints))]
    try:
        named = latest.read_text("utf-8").strip()
    except FileNotFoundError:
        named = ""
    except (OSError, UnicodeDecodeError):
        return [latest, *(checkpoints / name for name in names)]
    if named in names:
        names = [named, *(name for name in names if name != named)]
    return [checkpoints / name for name in names]


def first_complete(
    folders: Sequence[Path], check: Callable[[Path], Any] = verify
) -> tuple[Path, list[str]]:
    """The first folder that passes the check, and why those before it did not."""
    problems: list[str] = []
    for folder in folders:
        try:
            check(folder)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return folder, problems
    raise CheckpointError("; ".join(["no complete checkpoint", *problems]))


def open_tensors(folder: Path, stem: str) -> TensorFiles:
    """The weights or the optimizer state of a checkpoint, not verified again."""
    names = [name for name in read_manifest(folder)["files"] if _is_of(name, stem)]
    if not names:
        remedy = (
            "nothing resumes from it: start a new run from its weights with --init-from, or convert "
            "the run it came from with --reshard instead of --consolidate"
        )
        raise CheckpointError(f"{folder} holds no {stem} files; {remedy}")
    return TensorFiles(folder / name for name in names)


def open_weights(folder: Path) -> tuple[TensorFiles, dict[str, Any]]:
    """(weights, trainer state) of a checkpoint, whose files are verified first."""
    verify(folder, lambda name: _is_of(name, WEIGHTS) or name == TRAINER)
    return open_tensors(folder, WEIGHTS), read_trainer(folder)


def choose(checkpoints: Path, which: str = "best") -> Path:
    """The folder of `find`."""
    return find(checkpoints, which).folder


def find(checkpoints: Path, which: str) -> Chosen:
    """`best` if there is one, else the newest complete; or a step, or `latest`. Only the newest complete
    is verified here."""
    reason = "the newest complete"
    if which == "best":
        if (checkpoints / "best" / MANIFEST).is_file():
            return Chosen(checkpoints / "best", "the best on validation", [])
        which, reason = "latest", "the newest complete, as the run keeps no best"
    if which == "latest":
        folder, problems = first_complete(candidates(checkpoints))
        return Chosen(folder, reason, problems)
    if not (checkpoints / which / MANIFEST).is_file():
        steps = ", ".join(map(str, numbered(checkpoints))) or "none"
        raise CheckpointError(f"{checkpoints / which} does not exist; steps kept: {steps}")
    return Chosen(checkpoints / which, "the step asked for", [])


def _file_name(stem: str, rank: int, world: int) -> str:
    """`model.safetensors`, or of one of several `model-00002-of-00004.safetensors`."""
    return f"{stem}.safetensors" if world == 1 else f"{stem}-{rank:05d}-of-{world:05d}.safetensors"


def _is_of(name: str, stem: str) -> bool:
    return name.startswith((f"{stem}.", f"{stem}-")) and name.endswith(".safetensors")


def _entry(path: Path) -> dict[str, Any]:
    """Size and hash of a file that is on the disk, not in a buffer."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
