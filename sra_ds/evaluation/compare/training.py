"""Train the cells of a comparison, one run each, several at a time if asked to.

A finished cell is written at once; one that is there is not trained again, and one that was interrupted
goes on from its last checkpoint.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from tqdm import tqdm

from sra_ds.errors import ConfigError, TrainingError
from sra_ds.evaluation.compare.budgets import budget, require_matched
from sra_ds.evaluation.compare.cells import Cell
from sra_ds.evaluation.compare.finished import (
    FinishedCell,
    cell_file,
    cell_of_run,
    read_cell,
    write_cell,
)
from sra_ds.storage.run_dir import RunDir


class Launch(NamedTuple):
    """How runs are started."""

    script: Path
    """`launch/train.py`"""
    deepspeed: Path
    """DeepSpeed's JSON."""
    processes: int = 1
    """Of each run."""
    jobs: int = 1
    """Runs at a time, each with its share of the cores and of the GPUs."""


def train_cells(
    cells: Sequence[Cell], launch: Launch, out: Path, runs: Path, matched: Sequence[str] = ()
) -> list[FinishedCell]:
    """Train every cell that is not finished in a folder of its own in `runs`, and write it to `out`.

    Raises `ConfigError` before anything is trained; `TrainingError` when a run did not end: others that
    have begun end first, none begins any more.
    """
    _require_own_names(cells)
    budgets = {cell.recipe.name: budget(cell.recipe)[0] for cell in cells}
    require_matched(budgets, matched)
    _require_gpus(launch)
    found = {cell.name: _found(cell, out, runs) for cell in cells}
    missing = [cell for cell in cells if found[cell.name] is None]
    places: SimpleQueue[int] = SimpleQueue()
    for place in range(launch.jobs):
        places.put(place)
    bar = tqdm(total=len(cells), initial=len(cells) - len(missing), desc="cells")

    def finish(cell: Cell) -> None:
        place = places.get()
        try:
            finished = found[cell.name] = _train(cell, runs, launch, place)
        finally:
            places.put(place)
        write_cell(finished, out)
        bar.update()

    with bar, ThreadPoolExecutor(launch.jobs) as pool:
        futures = [pool.submit(finish, cell) for cell in missing]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
        for future in done:
            future.result()
    return [finished for finished in found.values() if finished is not None]


def _require_own_names(cells: Sequence[Cell]) -> None:
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two cells are called {name}; give variants a name (name=...)")


def _require_gpus(launch: Launch) -> None:
    there, wanted = torch.cuda.device_count(), launch.jobs * launch.processes
    if there and wanted > there:
        raise ConfigError(
            f"--jobs {launch.jobs} of --processes {launch.processes} are {wanted} GPUs, and there are "
            f"{there}"
        )


def _found(cell: Cell, out: Path, runs: Path) -> FinishedCell | None:
    """The cell if it is finished. Raises `ConfigError` for one of other settings under its name."""
    file, run = cell_file(out, cell.name), RunDir(runs / cell.name)
    for path, there in ((file, file.is_file()), (run.path, run.recipe_file.is_file())):
        if not there:
            continue
        trained = read_cell(path).resolved() if path == file else run.recipe()
        if trained != cell.recipe:
            raise ConfigError(f"{path} is of other settings; choose another --out or delete it")
    if file.is_file():
        return read_cell(file)
    if not run.summary_file.is_file():
        return None
    finished = cell_of_run(run.path)
    write_cell(finished, out)
    return finished


def _train(cell: Cell, runs: Path, launch: Launch, place: int) -> FinishedCell:
    run = RunDir(runs / cell.name)
    command = [sys.executable]
    if launch.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(launch.processes), "--"]
    command += [str(launch.script), "--deepspeed", str(launch.deepspeed), "--run", str(run.path)]
    if (run.checkpoints / "latest").is_file():
        command += ["--resume"]
    else:
        command += ["--recipe", cell.source, *cell.overrides]
    code = _call(command, run, launch, place)
    if code or not run.summary_file.is_file():
        raise TrainingError(f"cell {run.path} did not finish (exit {code}); call again to go on")
    return cell_of_run(run.path)


def _call(command: list[str], run: RunDir, launch: Launch, place: int) -> int:
    """Exit code. One run at a time shows what it says, of several each has a file."""
    environment = _environment(launch, place)
    if launch.jobs == 1:
        return subprocess.run(command, check=False, stdout=sys.stderr, env=environment).returncode
    log = run.path.with_name(f"{run.path.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        return subprocess.run(
            command, check=False, stdout=stream, stderr=stream, env=environment
        ).returncode


def _environment(launch: Launch, place: int) -> dict[str, str]:
    """With the job's share of the machine, where jobs share it."""
    own = dict(os.environ)
    if launch.jobs == 1:
        return own
    own.pop("MASTER_PORT", None)  # each finds one of its own
    cores = len(os.sched_getaffinity(0))
    own.setdefault("OMP_NUM_THREADS", str(max(1, cores // (launch.jobs * launch.processes))))
    if there := torch.cuda.device_count():
        names = own.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(there)))).split(",")
        first = place * launch.processes
        own["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + launch.processes])
    return own
