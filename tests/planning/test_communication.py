"""The bytes of planning/communication.py are those that real processes hand to collectives.

DeepSpeed is imported once per number of processes: all settings run in one start, and each test looks at
its own.
"""

from collections import Counter as Bag
from pathlib import Path
from typing import Any

import pytest
from planning.collectives import (
    FOUR,
    SETTINGS,
    TWO,
    Setting,
    count_steps,
)

from commands import ROOT, write_corpus, write_recipe
from distributed import config_of, run_ranks
from sra_ds.config import load_recipe
from sra_ds.planning.case import Case
from sra_ds.planning.communication import (
    CONTROL_BYTES,
    Transfer,
    loop_transfers,
    step_transfers,
    total_bytes,
)
from sra_ds.planning.shapes import Layout, optimizer_groups, read_shapes
from sra_ds.planning.zero import read_zero
from sra_ds.selftest.collectives import (
    CONTROL,
    CollectiveCounter,
    Sent,
    as_planned,
    planned_bytes,
    together,
)
from sra_ds.storage.run_dir import RunDir
from sra_ds.workflow.resolve import resolve
from sra_ds.workflow.train import train


@pytest.fixture(scope="module")
def counted() -> Any:
    """World size -> what each process counted, run once."""
    done: dict[int, list[dict[str, Sent]]] = {}

    def at(world: int) -> list[dict[str, Sent]]:
        if world not in done:
            done[world] = run_ranks(world, count_steps, world)
        return done[world]

    return at


def check(ranks: list[dict[str, Sent]], world: int, name: str) -> None:
    counted, case = together([rank[name] for rank in ranks]), SETTINGS[world][name].case(world)
    assert {key: size for key, size in counted.items() if key != CONTROL} == planned_bytes(case)
    assert as_planned(counted, case)


@pytest.mark.parametrize("name", TWO)
def test_two_processes_send_what_the_formula_says(counted, name):
    check(counted(2), 2, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_send_what_the_formula_says(counted, name):
    check(counted(4), 4, name)


SHORT = ["evaluation.every=0", "checkpoint.every=0", "logging.sample_tokens=0"]


def count_runs(file: str, folder: str) -> list[Sent]:
    """What this process handed over in a run of four steps, and in one of five."""
    found = []
    for steps in (4, 5):
        recipe = load_recipe(file, [*SHORT, f"training.steps={steps}"])
        resolved = resolve(recipe, ROOT / "ds_configs" / "zero2.json")
        with CollectiveCounter() as counter:
            train(resolved, RunDir(Path(folder) / str(steps)))
        found.append(dict(counter.bytes))
    return found


def test_a_step_of_the_trainer_adds_mean_losses_and_a_flag(tmp_path):
    """The difference of two runs is one step: evaluation, report and checkpoint are in both."""
    file = write_recipe(tmp_path, write_corpus(tmp_path / "text.jsonl"))
    four, five = (Bag(run) for run in run_ranks(2, count_runs, str(file), str(tmp_path))[0])
    recipe = load_recipe(file)
    zero = read_zero(config_of(2, "zero2.json"))
    windows = recipe.training.batch_size // 2
    case = Case(recipe, read_shapes(recipe), Layout(2), zero, windows, 1, 4, "cpu")
    expected: Bag[tuple[str, str]] = Bag()
    for transfer in [*step_transfers(case), *loop_transfers(case)]:
        expected[transfer.purpose, transfer.operation] += int(transfer.bytes)
    step = five - four
    control = step.pop(CONTROL, 0)
    assert step == expected
    assert control <= len(optimizer_groups(case.shapes, case.layout)) * CONTROL_BYTES


def test_a_ring_sends_what_each_process_has_to_pass_on():
    """Four processes: an all-reduce passes three quarters on twice, the others once; an all-gather passes
    on what the three others own."""
    sent = {
        operation: Transfer("", operation, 400, 4, 1).wire_bytes
        for operation in ("all_reduce", "reduce", "reduce_scatter", "all_to_all")
    }
    assert sent == {"all_reduce": 600, "reduce": 300, "reduce_scatter": 300, "all_to_all": 300}
    assert Transfer("", "all_gather", 100, 4, 1).wire_bytes == 300


def test_spreading_experts_trades_their_gradients_for_tokens():
    """At ep 2 of 2 nothing of the experts is reduced any more, and tokens are sent instead."""
    copied, spread = (step_transfers(Setting(ep, 1).case(2)) for ep in (1, 2))
    shapes = Setting(1, 1).case(2).shapes
    experts = sum(weight.numel for weight in shapes.weights if weight.expert) * 4
    saved = total_bytes(copied, "gradients") - total_bytes(spread, "gradients")
    assert saved == experts
    assert total_bytes(copied, "expert rows") == 0 < total_bytes(spread, "expert rows")


def test_other_bytes_than_planned_are_noticed():
    case = Setting(2, 1).case(2)
    planned = planned_bytes(case)
    assert as_planned({**planned, CONTROL: 16}, case)
    for key in planned:
        assert not as_planned({**planned, key: planned[key] + 4}, case)
    assert not as_planned({**planned, CONTROL: 10**6}, case)
    assert not as_planned({**planned, ("control", "broadcast"): 4}, case)
