"""Meeting before step 0: every process answers in time, or the start ends with one line that names the
hosts which do not.

    roll call       every process leaves its host in the store at MASTER_ADDR; rank 0 waits for all
    process group   `join`, in a thread
    collective      one all-reduce in that thread; whoever gets to it says so in the store

Meanwhile the main threads leave a growing number there, which tells a process that waits from one that
is frozen or gone. Rank 0 judges and leaves its verdict in the store, so that all ranks end with the same
line. In a healthy start nobody waits for anything but the others.
"""

import itertools
import math
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from sra_ds.errors import ConfigError, SraError, TrainingError
from sra_ds.training.environment import rank, world_size

TIMEOUT_VARIABLE, DEFAULT_SECONDS = "SRA_START_TIMEOUT", 180.0
HOSTFILE_VARIABLE, DEEPSPEED_HOSTFILE = "SRA_HOSTFILE", "/job/hostfile"
POLL_SECONDS, BEAT_SECONDS = 0.01, 0.2
SILENCE_SECONDS = 3.0  # without a beat, fifteen of which fit
GRACE_SECONDS = 10.0  # beyond the time-out, for rank 0's verdict


def start_together(join: Callable[[], None]) -> None:
    """Let `join` make the default process group and check it with one collective. Collective.

    Raises `TrainingError` on every rank that is left, with the hosts that do not answer within
    SRA_START_TIMEOUT seconds (180). One process alone just calls `join`.
    """
    if world_size() == 1 or dist.is_initialized():
        join()
        return
    seconds = allowed_seconds()
    meeting = Meeting(open_store(seconds), seconds)
    meeting.roll_call()
    meeting.collective(join)


def allowed_seconds() -> float:
    """The time-out of each stage; raises `ConfigError` if SRA_START_TIMEOUT is no positive number."""
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_SECONDS))
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise ConfigError(f"{TIMEOUT_VARIABLE}={text}: expected seconds, such as {DEFAULT_SECONDS:.0f}")


def open_store(seconds: float) -> Store:
    """The store that the process group will use too; rank 0 serves it unless torchrun does."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _wait_for_server(address, port, seconds)
    try:
        store = TCPStore(
            address, port, None, serves, timedelta(seconds=seconds),
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except dist.DistError as error:
        raise TrainingError(
            f"rank {rank()} on {own_host()} cannot {'listen on' if serves else 'use'} "
            f"{address}:{port} ({first_line(error)}): check MASTER_ADDR, or choose another MASTER_PORT"
        ) from error
    return PrefixStore(f"start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_server(address: str, port: int, seconds: float) -> None:
    """A plain connection first: torch's own prints pages of C++ frames when nobody listens."""
    problem = "no answer"

    def listening() -> bool:
        nonlocal problem
        try:
            socket.create_connection((address, port), timeout=min(seconds, 5.0)).close()
        except OSError as error:
            problem = str(error)
            return False
        return True

    if not _until(listening, seconds, pause=0.05):
        raise TrainingError(
            f"rank {rank()} on {own_host()} did not find rank 0 on {planned_hosts()[0]} at "
            f"{address}:{port} within {seconds:g} s ({problem}): check that rank 0 was started there, "
            f"that MASTER_ADDR is an address {own_host()} reaches and that the port is open; "
            f"{TIMEOUT_VARIABLE} sets the time"
        )


class Task(threading.Thread):
    """A call in a thread of its own, because nothing else gets out of a library that waits."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.call = call
        self.result: Any = None
        self.failure: Exception | None = None
        self.start()

    @property
    def succeeded(self) -> bool:
        """Whether the call has returned."""
        return not self.is_alive() and self.failure is None

    def run(self) -> None:
        """Keep what the call returned or raised."""
        try:
            self.result = self.call()
        except Exception as error:  # raised or judged by who waits
            self.failure = error


class Meeting:
    """One rank's part in the start; `store` is shared by all ranks."""

    def __init__(self, store: Store, seconds: float) -> None:
        self.store, self.seconds = store, seconds
        self.rank, self.ranks = rank(), range(world_size())
        self._beats = itertools.count()

    def roll_call(self) -> None:
        """Every rank leaves its host; raises `TrainingError` naming those that did not."""
        self._leave(f"host/{self.rank}", own_host())
        self._beat()
        if self.rank == 0:
            everyone = [f"host/{r}" for r in self.ranks]
            _until(lambda: self._has(*everyone), self.seconds)
            absent = self._absent()
            self._leave("roll", self._no_answer(absent) if absent else "")
        elif not self._sees(
            "roll", self.seconds + GRACE_SECONDS
        ):  # torchrun's store without rank 0
            raise TrainingError(self._no_answer(self._absent() or [0]))
        self._end_with(self._read("roll"))

    def collective(self, join: Callable[[], None]) -> None:
        """Make the process group and use it once; raises `TrainingError` naming who does not."""
        task = Task(lambda: self._join_and_reduce(join))
        deadline = time.monotonic() + self.seconds
        try:
            while task.is_alive() and time.monotonic() < deadline and not self._has("called off"):
                task.join(BEAT_SECONDS)
                self._beat()
        except TrainingError:  # rank 0 may have come through, gone on and ended already
            task.join(BEAT_SECONDS)
            if not task.succeeded:
                raise
        if task.succeeded:
            with suppress(TrainingError):
                self._leave(f"done/{self.rank}")
            return
        self._call_off(task.failure)
        if self.rank == 0:
            self._leave("verdict", self._judge())
        else:
            self._sees("verdict", GRACE_SECONDS)
        self._end_with(self._read("verdict") or self._judge(), task.failure)

    def _join_and_reduce(self, join: Callable[[], None]) -> None:
        """In a thread of its own, to which CUDA's current device belongs."""
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        join()
        self.store.set(f"joined/{self.rank}", "")
        one = torch.ones((), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(one)
        one.item()  # on a GPU the call above only queues it

    def _call_off(self, failure: Exception | None) -> None:
        """Tell the others; raise at once what is this process's own fault."""
        if failure is not None:
            self._leave(f"failed/{self.rank}", first_line(failure))
        self._leave("called off")
        if failure is not None and (
            isinstance(failure, SraError) or not isinstance(failure, RuntimeError)
        ):
            raise failure

    def _end_with(self, verdict: str, cause: Exception | None = None) -> None:
        """Raise `TrainingError` unless the verdict is empty; rank 0, which serves the store, stays until
        those who are there have read it."""
        if not verdict:
            return
        self._leave(f"read/{self.rank}")
        if self.rank == 0:
            present = [f"read/{r}" for r in self.ranks if self._has(f"host/{r}")]
            _until(lambda: self._has(*present), SILENCE_SECONDS)
        raise TrainingError(verdict) from cause

    def _absent(self) -> list[int]:
        return [r for r in self.ranks if not self._has(f"host/{r}")]

    def _no_answer(self, absent: list[int]) -> str:
        came = len(self.ranks) - len(absent)
        return (
            f"no answer from {self._who(absent)} within {self.seconds:g} s: {came} of "
            f"{len(self.ranks)} processes came to {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}; check that the host is up, that its process was started "
            f"and logged no error, and that it reaches this address; {TIMEOUT_VARIABLE} sets the time"
        )

    def _judge(self) -> str:
        """What went wrong after the roll call, the most certain cause first."""
        before = {r: self._read(f"beat/{r}") for r in self.ranks}
        for _ in range(round(SILENCE_SECONDS / BEAT_SECONDS)):
            time.sleep(BEAT_SECONDS)
            self._beat()
        silent = [
            r
            for r in self.ranks
            if self._read(f"beat/{r}") == before[r] and not self._has(f"done/{r}")
        ]
        failed = [r for r in self.ranks if self._has(f"failed/{r}")]
        idle = [r for r in self.ranks if not self._has(f"joined/{r}")]
        gone = sorted(set(silent) - set(failed))
        if gone:
            return (
                f"no answer from {self._who(gone)} after the roll call: killed, frozen or cut off; "
                "check that host and its log"
            )
        for r in sorted(set(failed) & set(silent)) or failed:
            return (
                f"{self._who([r])} could not join the others: {self._read(f'failed/{r}')}; check its "
                f"log and its network ({_interface()})"
            )
        if 0 < len(idle) < len(self.ranks):
            return (
                f"{self._who(idle)} came to the roll call but not to the first collective within "
                f"{self.seconds:g} s; check what keeps it busy there, or raise {TIMEOUT_VARIABLE}"
            )
        return (
            f"{self._who(self.ranks)} are alive but not connected within {self.seconds:g} s: check "
            f"that all ports are open between them and the interface ({_interface()}), or raise "
            f"{TIMEOUT_VARIABLE} if a first start still compiles"
        )

    def _who(self, ranks: Iterable[int]) -> str:
        """`host-b (ranks 2-3), host-c (rank 4)`; a host that did not come as its launcher planned it, or
        as a rank beside it says."""
        plan = planned_hosts()
        came = {r: self._read(f"host/{r}") for r in self.ranks}
        name_of = {plan[r]: host for r, host in came.items() if host}
        hosts: dict[str, list[int]] = {}
        for r in ranks:
            hosts.setdefault(came[r] or name_of.get(plan[r], plan[r]), []).append(r)
        return ", ".join(f"{host} ({_ranges(members)})" for host, members in hosts.items())

    def _beat(self) -> None:
        self._leave(f"beat/{self.rank}", str(next(self._beats)))

    def _sees(self, key: str, seconds: float) -> bool:
        def there() -> bool:
            self._beat()
            return self._has(key)

        return _until(there, seconds)

    def _leave(self, key: str, text: str = "") -> None:
        self._ask(lambda: self.store.set(key, text))

    def _has(self, *keys: str) -> bool:
        return bool(self._ask(lambda: self.store.check(list(keys))))

    def _read(self, key: str) -> str:
        """What was left under this key; empty if nothing was."""
        return self._ask(lambda: self.store.get(key)).decode() if self._has(key) else ""

    def _ask(self, call: Callable[[], Any]) -> Any:
        """The store's answer; a rank 0 that is frozen never gives one."""
        task = Task(call)
        task.join(self.seconds)
        if task.is_alive():
            raise TrainingError(self._lost_first("no answer from its store"))
        if task.failure is not None:
            raise TrainingError(self._lost_first(first_line(task.failure))) from task.failure
        return task.result

    def _lost_first(self, problem: str) -> str:
        return (
            f"rank {self.rank} on {own_host()} lost rank 0 on {planned_hosts()[0]} "
            f"({os.environ['MASTER_ADDR']}) during the start ({problem}): check that host and the log "
            "of rank 0"
        )


def own_host() -> str:
    """This host's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def planned_hosts() -> list[str]:
    """The host of every rank, as slurm or a hostfile says, else the number of its node."""
    world = world_size()
    nodes = _slurm_nodes() or _hostfile_nodes()
    if nodes and sum(count for _, count in nodes) != world and world % len(nodes) == 0:
        nodes = [(host, world // len(nodes)) for host, _ in nodes]
    hosts = [host for host, count in nodes for _ in range(count)]
    if len(hosts) == world:
        return hosts
    beside = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0)
    if beside == world:
        return [own_host()] * world
    if beside and world % beside == 0:
        return [f"node {r // beside + 1} of {world // beside}" for r in range(world)]
    return ["a host unknown here"] * world


def _slurm_nodes() -> list[tuple[str, int]]:
    """(host, processes) of this job step, in slurm's order."""
    for names, counts in (
        ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"),
        ("SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE"),
    ):
        if names in os.environ and counts in os.environ:
            tasks: list[int] = []  # 2(x3),1 is 2, 2, 2, 1
            for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", os.environ[counts]):
                tasks += [int(count)] * int(times or 1)
            hosts = _expand(os.environ[names])
            return list(zip(hosts, tasks, strict=True)) if len(hosts) == len(tasks) else []
    return []


def _expand(names: str) -> list[str]:
    """node[1-3] as slurm expands it; one plain name needs no slurm."""
    if not re.search(r"[\[,]", names):
        return [names]
    try:
        command = ["scontrol", "show", "hostnames", names]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return shown.stdout.split()


def _hostfile_nodes() -> list[tuple[str, int]]:
    """(host, slots) of the hostfile that was given to the deepspeed launcher."""
    path = Path(os.environ.get(HOSTFILE_VARIABLE, DEEPSPEED_HOSTFILE))
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        return []
    found = [re.match(r"\s*([^#\s]+)\s+slots=(\d+)", line) for line in lines]
    return [(match[1], int(match[2])) for match in found if match]


def first_line(error: Exception) -> str:
    """The first line of an error's text; torch and gloo add C++ frames below it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _interface() -> str:
    name = "NCCL_SOCKET_IFNAME" if torch.cuda.is_available() else "GLOO_SOCKET_IFNAME"
    return f"{name}={os.environ[name]}" if name in os.environ else f"{name} is not set"


def _ranges(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for r in ranks:
        if runs and runs[-1][-1] == r - 1:
            runs[-1].append(r)
        else:
            runs.append([r])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"


def _until(true: Callable[[], bool], seconds: float, pause: float = POLL_SECONDS) -> bool:
    """Whether `true()` became true in time; asked more and more slowly, at least every 0.1 s."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
    return True
