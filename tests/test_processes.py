"""What connected processes have together: everybody knows of what happened to one."""

import numpy as np
import torch

from distributed import run_ranks
from sra_ds import processes
from sra_ds.errors import DataError


def _act(rank: int, failing: int) -> str:
    if rank == failing:
        raise OSError("the disk is gone")
    return f"from {rank}"


def _outcome(failing: int, only_first: bool) -> str | None:
    try:
        return processes.together(lambda: _act(processes.rank(), failing), DataError, only_first)
    except (OSError, DataError) as error:
        return f"{type(error).__name__}: {error}"


def _answers() -> dict[str, object]:
    rank = processes.rank()
    mine = np.array([[1.0, rank]])
    return {
        "said": processes.from_all(rank),
        "first": processes.from_first(str(rank)),
        "any": [processes.any_of(rank == 1), processes.any_of(False)],
        "mean": processes.mean_over_ranks(torch.tensor([float(rank), 3.0])).tolist(),
        "sums": [own.tolist() for own in processes.sum_over_ranks(mine, mine[0])],
        "acts": [
            _outcome(failing, first) for failing, first in ((9, False), (9, True), (1, False))
        ],
    }


def test_two_processes_hear_each_other() -> None:
    first, second = run_ranks(2, _answers)
    for name in ("said", "first", "any", "mean", "sums"):
        assert first[name] == second[name]
    assert (first["said"], first["first"], first["any"]) == ([0, 1], "0", [True, False])
    assert first["mean"] == [0.5, 3.0] and first["sums"] == [[[2.0, 1.0]], [2.0, 1.0]]
    assert first["acts"] == ["from 0", "from 0", "DataError: process 1: the disk is gone"]
    assert second["acts"] == ["from 1", None, "OSError: the disk is gone"]


def test_one_process_answers_for_itself() -> None:
    assert (processes.several(), processes.rank(), processes.world_size()) == (False, 0, 1)
    found = _answers()
    assert found["acts"] == ["from 0", "from 0", "from 0"]
    assert (found["said"], found["first"], found["any"]) == ([0], "0", [False, False])
    assert found["mean"] == [0.0, 3.0] and found["sums"] == [[[1.0, 0.0]], [1.0, 0.0]]
    assert _outcome(0, False) == "OSError: the disk is gone"
