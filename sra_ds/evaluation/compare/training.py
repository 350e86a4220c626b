"""Train the cells of a comparison, one run each, several at a time if asked to.

A finished cell is written at once; one that is there is not trained again, and one that was interrupted
goes on from its last checkpoint. Runs are told to stop as the comparison is: they save and leave.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

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
from sra_ds.evaluation.compare.settings import first_difference, portable
from sra_ds.storage.checkpoint import candidates
from sra_ds.storage.run_dir import RunDir

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


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
    recipes = {cell.recipe.name: cell.recipe for cell in cells}  # of any seed
    require_matched({name: budget(recipe)[0] for name, recipe in recipes.items()}, matched)
    _require_gpus(launch)
    found = {cell.name: _found(cell, out, runs) for cell in cells}
    missing = [cell for cell in cells if found[cell.name] is None]
    bar = tqdm(total=len(cells), initial=len(cells) - len(missing), desc="cells")
    jobs = _Jobs(launch, runs)

    def finish(cell: Cell) -> None:
        finished = found[cell.name] = jobs.train(cell)
        if finished is not None:
            write_cell(finished, out)
            bar.update()

    with bar, jobs.signals_passed_on(), ThreadPoolExecutor(launch.jobs) as pool:
        futures = [pool.submit(finish, cell) for cell in missing]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
        for future in done:
            future.result()
    finished = [one for one in found.values() if one is not None]
    if len(finished) < len(cells):
        raise TrainingError(
            f"stopped with {len(finished)} of {len(cells)} cells; the same command goes on"
        )
    return finished


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
    if file.is_file():
        finished = read_cell(file)
        _require_same(file, finished.settings, cell)
        return finished
    if run.recipe_file.is_file():
        _require_same(run.path, portable(run.recipe()), cell)
    if not run.summary_file.is_file():
        return None
    finished = cell_of_run(run.path)
    write_cell(finished, out)
    return finished


def _require_same(path: Path, settings: dict[str, Any], cell: Cell) -> None:
    """Raise `ConfigError`, naming the first key that is another."""
    asked = portable(cell.recipe)
    key = first_difference(settings, asked)
    if key is not None:
        raise ConfigError(
            f"{path} is of other settings ({key}); choose another --out, or a name of its own (name=...)"
        )


class _Jobs:
    """Runs that are being trained; when one did not end, or after a signal, no other one begins."""

    def __init__(self, launch: Launch, runs: Path) -> None:
        self.launch, self.runs = launch, runs
        self.running: set[subprocess.Popen[bytes]] = set()
        self.over = threading.Event()
        self.places: SimpleQueue[int] = SimpleQueue()
        for place in range(launch.jobs):
            self.places.put(place)

    @contextmanager
    def signals_passed_on(self) -> Iterator[None]:
        """To the runs, whose end is then that of the comparison; as SIGTERM, which torchrun knows, too. A
        terminal sends them Ctrl-C itself: the second of two signals changes nothing."""

        def pass_on(*_: object) -> None:
            self.over.set()
            for process in list(self.running):
                process.terminate()

        before = {one: signal.signal(one, pass_on) for one in SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def train(self, cell: Cell) -> FinishedCell | None:
        """None when it may not begin or was told to stop. Raises `TrainingError` when it does not end."""
        run, place = RunDir(self.runs / cell.name), self.places.get()
        try:
            if self.over.is_set():
                return None
            code = self._call(cell, run, place)
            if self.over.is_set() and not code and not run.summary_file.is_file():
                return None  # it was told to stop, and has saved
            if code or not run.summary_file.is_file():
                self.over.set()
                said = "" if self.launch.jobs == 1 else f": {_log_of(run)} says why"
                problem = f"cell {run.path} did not finish (exit {code}){said}"
                tqdm.write(problem, file=sys.stderr)  # other runs may take hours to end
                raise TrainingError(f"{problem}; the same command goes on")
        finally:
            self.places.put(place)
        return cell_of_run(run.path)

    def _call(self, cell: Cell, run: RunDir, place: int) -> int:
        """Exit code. One run at a time shows what it says, of several each has a file."""
        run.path.parent.mkdir(parents=True, exist_ok=True)
        with nullcontext(sys.stderr) if self.launch.jobs == 1 else _log_of(run).open("a") as stream:
            process = subprocess.Popen(
                _command(cell, run, self.launch),
                stdout=stream, stderr=stream, env=_environment(self.launch, place),
            )  # fmt: skip
            self.running.add(process)
            if self.over.is_set():  # a signal that came while it was started
                process.terminate()
            try:
                return process.wait()
            finally:
                self.running.discard(process)


def _log_of(run: RunDir) -> Path:
    return run.path.with_name(f"{run.path.name}.log")


def _command(cell: Cell, run: RunDir, launch: Launch) -> list[str]:
    command = [sys.executable]
    if launch.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(launch.processes), "--"]
    command += [str(launch.script), "--deepspeed", str(launch.deepspeed), "--run", str(run.path)]
    if candidates(run.checkpoints):
        return [*command, "--resume"]
    return [*command, "--recipe", cell.source, *cell.overrides]


def _environment(launch: Launch, place: int) -> dict[str, str]:
    """With the share of the machine of each process, where several share it."""
    own = dict(os.environ)
    sharing = launch.jobs * launch.processes
    if sharing > 1:  # torchrun would give each process one thread
        threads = max(1, len(os.sched_getaffinity(0)) // sharing)
        own.setdefault("OMP_NUM_THREADS", str(threads))
    if launch.jobs == 1:
        return own
    own.pop("MASTER_PORT", None)  # each finds one of its own
    if there := torch.cuda.device_count():
        names = own.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(there)))).split(",")
        first = place * launch.processes
        own["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + launch.processes])
    return own
