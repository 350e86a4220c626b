"""A run is a directory anyone can read.

recipe.yaml ds_config.json environment.json tokenizer.json metrics.jsonl summary.json samples.txt
checkpoints/<step>/ checkpoints/best/ checkpoints/latest routing/ evaluation/ figures/
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sra_ds.config import Recipe, dump_recipe, load_recipe
from sra_ds.errors import CheckpointError, ConfigError, SraError

PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "safetensors")
ANALYSIS_SCHEMA = 2
"""Of `analysis.json`."""


class RunDir:
    """Paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.ds_config_file = path / "ds_config.json"
        self.environment_file = path / "environment.json"
        self.tokenizer_file = path / "tokenizer.json"
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.samples_file = path / "samples.txt"
        self.analysis_file = path / "analysis.json"
        self.checkpoints = path / "checkpoints"
        self.routing = path / "routing"
        self.evaluation = path / "evaluation"
        self.figures = path / "figures"

    def recipe(self, overrides: list[str] | None = None) -> Recipe:
        """The merged recipe the run was started with."""
        if not self.recipe_file.is_file():
            raise CheckpointError(f"{self.path} is not a run directory (it has no recipe.yaml)")
        return load_recipe(self.recipe_file, overrides)

    def environment(self) -> dict[str, Any]:
        """What `write_start` recorded of machine and corpus."""
        return read_json_object(self.environment_file)

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of `metrics.jsonl`; a line cut by a crash is left out."""
        lines = []
        if self.metrics_file.is_file():
            for line in self.metrics_file.read_text("utf-8", "replace").splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    continue
        return lines

    def analysis(self, step: int) -> dict[str, Any] | None:
        """What `tools/analyze.py` found in the checkpoint of that step; None where it looked at another
        one, or at none, or wrote another form."""
        if not self.analysis_file.is_file():
            return None
        found = read_json_object(self.analysis_file)
        expected = {"schema_version": ANALYSIS_SCHEMA, "step": step}
        return found if expected.items() <= found.items() else None

    def drop_metrics_after(self, step: int, last: int) -> None:
        """Forget what a run resumed after `step` will do again: later steps and the final evaluation,
        which comes after the last step."""
        kept = [
            line
            for line in self.metrics()
            if line["step"] <= step and not ("validation" in line and line["step"] >= last)
        ]
        write_atomically(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))

    def write_start(self, recipe: Recipe, ds_config: dict[str, Any], facts: dict[str, Any]) -> None:
        """What was asked for and where it runs."""
        started = time.time()
        if self.environment_file.is_file():
            started = self.environment().get("started", started)
        for folder in (self.checkpoints, self.routing, self.evaluation, self.figures):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.recipe_file, dump_recipe(recipe))
        write_atomically(self.ds_config_file, json.dumps(ds_config, indent=1))
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        python = platform.python_version()
        environment = {"started": started, "python": python, **versions, **facts}
        write_atomically(self.environment_file, json.dumps(environment, indent=1))


def new_run_dir(recipe: Recipe, root: Path = Path("runs")) -> RunDir:
    """`runs/<recipe>-<timestamp>`; the processes of a launch agree on rank 0's."""
    return RunDir(root / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")


def newest_run(name: str, root: Path = Path("runs")) -> RunDir:
    """The most recently started run of a recipe that has a checkpoint; unreadable folders are passed
    over."""
    found: list[tuple[float, RunDir]] = []
    for path in {manifest.parents[2] for manifest in root.glob("*/checkpoints/*/manifest.json")}:
        try:
            run = open_run(path)
            if run.recipe().name == name:
                found.append((run.environment().get("started", 0.0), run))
        except SraError:
            continue
    if not found:
        raise CheckpointError(f"no run of recipe {name!r} with a checkpoint under {root}/")
    return max(found, key=lambda pair: pair[0])[1]


def open_run(path: Path) -> RunDir:
    """An existing run; raises `CheckpointError` if it is none."""
    if not (path / "recipe.yaml").is_file():
        raise CheckpointError(f"{path} is not a run directory (it has no recipe.yaml)")
    return RunDir(path)


@contextmanager
def claim(run: RunDir) -> Iterator[None]:
    """Hold the run for this process; raises `ConfigError` if another one trains there. A folder that is
    still empty at the end is removed again."""
    run.path.mkdir(parents=True, exist_ok=True)
    lock = run.path / "lock"
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run.path}: another process is training there; choose another --run"
            ) from None
        try:
            yield
        finally:
            if list(run.path.iterdir()) == [lock]:
                lock.unlink()
                run.path.rmdir()


def refuse_overwriting(run: RunDir) -> None:
    """A new run must not bury an old one; what failed before its first checkpoint is no run yet, though
    an evaluation may have left its best weights."""
    manifests = run.checkpoints.glob("*/manifest.json")
    if any(path.parent.name.isdigit() for path in manifests) or run.summary_file.exists():
        raise ConfigError(f"{run.path} already holds a run; use --resume, or another --run")


def refuse_taken(out: RunDir) -> None:
    """A conversion writes where nothing is, or into an empty folder; raises `ConfigError`."""
    empty = out.path.is_dir() and not any(out.path.iterdir())
    if os.path.lexists(out.path) and not empty:
        raise ConfigError(f"{out.path} exists already; choose another --out")


@contextmanager
def complete_or_absent(out: RunDir) -> Iterator[RunDir]:
    """A run directory to write into that becomes `out` when all went well (see `finished_folder`).
    Raises `ConfigError` if `out` is taken or another process writes it."""
    refuse_taken(out)
    with finished_folder(out.path.resolve(), "choose another --out") as partial:
        yield RunDir(partial)
        refuse_taken(out)


@contextmanager
def finished_folder(final: Path, advice: str) -> Iterator[Path]:
    """A folder beside `final` to write into: it takes the name of `final`, which must be free by then,
    when all went well, and is deleted when not. What a killed process left of one is deleted first.
    Raises `ConfigError` with `advice` if another process writes it."""
    partial = final.with_name(f"{final.name}.partial")
    mark = partial / "unfinished"
    if partial.exists() and any(partial.iterdir()) and not mark.exists():
        raise ConfigError(f"{partial} is in the way; move it, or {advice}")
    partial.mkdir(parents=True, exist_ok=True)
    with mark.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{final}: another process is writing it; {advice}") from None
        if not mark.exists():  # renamed between our opening and locking it
            raise ConfigError(f"{final}: another process has just written it; {advice}")
        try:
            _clear(partial, mark)
            yield partial
            partial.rename(final)
            (final / mark.name).unlink()
        finally:
            if partial.exists():
                _clear(partial, mark)
                shutil.rmtree(partial, ignore_errors=True)


def _clear(folder: Path, mark: Path) -> None:
    """Delete all but the mark, which goes last: without it the folder would not be known as ours."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != mark:
            path.unlink()


def read_json(path: Path) -> Any:
    """Parsed JSON; raises `CheckpointError` naming the file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object; raises `CheckpointError` naming the file."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged (it holds no JSON object)")
    return found


def require_file(path: Path, option: str = "--out") -> None:
    """Raise `ConfigError` if what an option names as a file to write is a folder."""
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a directory; name a file")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that readers and crashes see the old or the new text, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
