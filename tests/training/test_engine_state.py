"""A run goes on at any layout: every bit of weights and optimizer state arrives, the same losses follow.

    2 processes    train three steps, save, take three more
    1 process      goes on from there at every stage, and saves what it was given
    2 processes    go on from that at other layouts

Checkpoints are compared bit by bit, losses with plain torch. Each start of processes is an act that plays
all its jobs, and each test looks at one.
"""

import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from commands import launch, losses, train
from distributed import (
    config_of,
    engine_step,
    enlarge,
    held_weights,
    open_engine,
    plain_step,
    recipe_of,
    run_ranks,
)
from sra_ds.config import Recipe
from sra_ds.inference.load import load_weights_into
from sra_ds.model.language_model import build_model
from sra_ds.storage import checkpoint
from sra_ds.training.engine import build_optimizer
from sra_ds.training.engine_state import EngineState, engine_state, restore_engine

SAVED_AT, MORE = 3, 3
"""Steps before a checkpoint and after it."""
TOLERANCE = 2e-5
"""Of losses after a change of layout."""
BF16_TOLERANCE = 0.1
"""Of losses between layouts, of 8.5; what arrives is compared bit by bit."""
ADAM = {"optimizer": {"kind": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}}
RUNS: dict[str, dict[str, Any]] = {
    "fp32": ADAM,
    "bf16": {**ADAM, "precision": "bf16"},
    "momentum": {"optimizer": {"kind": "sgd", "learning_rate": 0.1, "momentum": 0.9}},
}


class Job(NamedTuple):
    """One engine: three steps or a checkpoint, saved as it is then, and three steps more."""

    run: str
    ep: int
    stage: int
    start: str = ""
    """Name of the job whose checkpoint it goes on from."""
    shipped: str = ""

    def recipe(self) -> Recipe:
        return recipe_of(self.ep, {"training": RUNS[self.run]})


class Act(NamedTuple):
    """Jobs that one start of processes plays, by name."""

    world: int
    jobs: dict[str, Job]


TWO = [
    Act(2, {run: Job(run, 2, 2) for run in RUNS}),
    Act(
        1,
        {
            **{f"one-zero{stage}": Job("fp32", 1, stage, "fp32") for stage in range(4)},
            "one-offload": Job("fp32", 1, 2, "fp32", "zero2_offload.json"),
            "one-bf16-zero1": Job("bf16", 1, 1, "bf16"),
            "one-bf16-zero3": Job("bf16", 1, 3, "bf16"),
            "one-momentum": Job("momentum", 1, 1, "momentum"),
        },
    ),
    Act(
        2,
        {
            "two-zero3": Job("fp32", 2, 3, "one-zero0"),
            "two-ep1-zero1": Job("fp32", 1, 1, "one-zero3"),
            "two-zero0": Job("fp32", 2, 0, "one-offload"),
            "two-bf16": Job("bf16", 2, 1, "one-bf16-zero3"),
            "two-momentum": Job("momentum", 2, 3, "one-momentum"),
        },
    ),
]
FOUR = [
    Act(4, {"fp32": Job("fp32", 4, 2), "bf16": Job("bf16", 2, 3)}),
    Act(
        1,
        {
            **{f"one-zero{stage}": Job("fp32", 1, stage, "fp32") for stage in range(4)},
            "one-bf16": Job("bf16", 1, 2, "bf16"),
        },
    ),
    Act(
        4,
        {
            "four-zero2": Job("fp32", 4, 2, "one-zero1"),
            "four-zero3": Job("fp32", 4, 3, "one-zero2"),
            "four-ep2-zero0": Job("fp32", 2, 0, "one-zero3"),
            "four-ep2-zero3": Job("fp32", 2, 3, "one-zero0"),
            "four-ep1-zero1": Job("fp32", 1, 1, "one-zero0"),
            "four-bf16": Job("bf16", 2, 2, "one-bf16"),
        },
    ),
]
STORIES = {2: TWO, 4: FOUR}


class Told(NamedTuple):
    """What one process knows of a job."""

    ranges: dict[str, tuple[Any, ...]]
    """Shape, start and stop of what it saved, by file stem and name."""
    held: dict[str, Tensor]
    """Weights the model computed with when it saved."""
    losses: list[float]
    adam_steps: set[float]
    steps_partitions: bool
    """Whether torch's optimizer keeps its state under the float32 partitions that were read."""


def play(folder: str, story: int, act: int) -> dict[str, tuple[Any, ...]]:
    """The jobs of an act on this process."""
    jobs = STORIES[story][act].jobs
    return {name: tuple(play_job(Path(folder), name, job)) for name, job in jobs.items()}


def play_job(folder: Path, name: str, job: Job) -> Told:
    recipe, engine = job.recipe(), open_job(folder, job)
    for number in range(0 if job.start else SAVED_AT):
        engine_step(engine, recipe, number)
    state, held = engine_state(engine), held_weights(engine)
    save(folder / name, engine, state, job)
    numbers = range(SAVED_AT, SAVED_AT + MORE)
    losses = [engine_step(engine, recipe, number)[0] for number in numbers]
    found = engine_state(engine).optimizer
    steps = {float(part.values) for path, part in found.items() if path.endswith("/step")}
    told = Told(ranges_of(state), held, losses, steps, steps_partitions(engine))
    engine.destroy()
    return told


def open_job(folder: Path, job: Job) -> Any:
    start, config = folder / job.start, config_of(job.stage, job.shipped)
    fill = (lambda model: load_weights_into(model, start)) if job.start else enlarge
    engine = open_engine(job.recipe(), config, fill)
    missing = missing_attributes(engine)
    assert not missing, f"engine_state reads of DeepSpeed what is not there: {missing}"
    if job.start:
        stems = (checkpoint.WEIGHTS, checkpoint.OPTIMIZER)
        restore_engine(engine, *[checkpoint.open_tensors(start, stem) for stem in stems])
    return engine


def save(folder: Path, engine: Any, state: EngineState, job: Job) -> None:
    tensors = {checkpoint.WEIGHTS: state.weights, checkpoint.OPTIMIZER: state.optimizer}
    held = engine.module.routed_layers()[0].backend.experts.expert_ids
    layout = checkpoint.Layout(dist.get_world_size(), job.stage, job.ep)
    checkpoint.save_checkpoint(folder, checkpoint.Contents(tensors, {}, {}, held), layout)


def ranges_of(state: EngineState) -> dict[str, tuple[Any, ...]]:
    parts = {f"model {name}": part.range for name, part in state.weights.items()}
    parts |= {f"optimizer {name}": part.range for name, part in state.optimizer.items()}
    return {name: tuple(part) for name, part in parts.items()}


def missing_attributes(engine: Any) -> list[str]:
    """What `engine_state` reads of DeepSpeed 0.19.8 and is not there, with the stage."""
    stage, parameters = engine.zero_optimization_stage(), list(engine.module.parameters())
    mappings = [getattr(parameter, "_hp_mapping", None) for parameter in parameters]
    owners = {
        "engine": [engine],
        "optimizer": [engine.optimizer],
        "parameter": parameters,
        "mapping": [mapping for mapping in mappings if mapping is not None],
    }
    missing = {
        f"stage {stage}: {kind}.{path}"
        for kind, paths in READ[stage].items()
        for path in paths.split()
        for owner in owners[kind]
        if not has(owner, path)
    }
    return sorted(missing)


def steps_partitions(engine: Any) -> bool:
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return isinstance(zero, torch.optim.Optimizer) and not hasattr(zero, "optimizer")
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    flats, inner = getattr(zero, name), zero.optimizer
    stepped = all(flat.dtype == torch.float32 and flat in inner.state for flat in flats)
    return isinstance(inner, torch.optim.Optimizer) and stepped


ENGINE = "zero_optimization_stage global_rank module optimizer"
PARTITIONED = {
    "engine": ENGINE,
    "optimizer": "single_partition_of_fp32_groups",
    "parameter": "_hp_mapping",
    "mapping": "hp_fragment_address.start hp_fragment_address.numel lp_fragment_address.start "
    "param_group_index",
}
READ: dict[int, dict[str, str]] = {
    0: {"engine": ENGINE, "optimizer": "state"},
    1: PARTITIONED,
    2: PARTITIONED,
    3: {
        "engine": ENGINE,
        "optimizer": "grad_position get_param_id fp32_partitioned_groups_flat",
        "parameter": "ds_id ds_shape ds_numel ds_zero_partition_rank",
    },
}


def has(owner: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


class Story(NamedTuple):
    """All acts played."""

    folder: Path
    jobs: dict[str, Job]
    ranks: dict[str, list[Told]]
    """By job and process."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Everything in the checkpoint of a job, by file stem and name."""
        found = {}
        for stem in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
            files = checkpoint.open_tensors(self.folder / name, stem)
            found |= {f"{stem} {path}": files.read(path) for path in files.names}
        return found


def tell(folder: Path, story: int) -> Story:
    told: dict[str, list[Told]] = {}
    for number, act in enumerate(STORIES[story]):
        ranks = run_ranks(act.world, play, str(folder), story, number)
        told |= {name: [Told(*found[name]) for found in ranks] for name in act.jobs}
    return Story(folder, jobs_of(story), told)


def jobs_of(story: int) -> dict[str, Job]:
    return {name: job for act in STORIES[story] for name, job in act.jobs.items()}


@pytest.fixture(scope="module")
def story_of_2(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return tell(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def story_of_4(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return tell(tmp_path_factory.mktemp("four"), 4)


@pytest.fixture
def played(request: pytest.FixtureRequest, story: int) -> Story:
    """The story of so many processes, told once."""
    found: Story = request.getfixturevalue(f"story_of_{story}")
    return found


@functools.cache
def plain_losses(run: str, world: int) -> list[float]:
    """The losses of an uninterrupted run of plain torch after the checkpoint."""
    recipe = recipe_of(1, {"training": RUNS[run]})
    model = build_model(recipe)
    enlarge(model)
    optimizer = build_optimizer(model, recipe)
    steps = range(SAVED_AT + MORE)
    return [plain_step(model, optimizer, recipe, n, world)[0] for n in steps][SAVED_AT:]


def every_job(only: Callable[[Job], bool] = lambda job: True) -> Any:
    """Each job of both stories; those of four processes are slow."""
    return pytest.mark.parametrize(
        ("story", "name"),
        [
            pytest.param(story, name, marks=[pytest.mark.slow] if story == 4 else [])
            for story in STORIES
            for name, job in jobs_of(story).items()
            if only(job)
        ],
    )


@every_job()
def test_the_optimizer_steps_the_partitions_that_are_saved(played: Story, name: str) -> None:
    assert all(found.steps_partitions for found in played.ranks[name])


@every_job()
def test_every_element_is_written_by_one_process(played: Story, name: str) -> None:
    ranges = [found.ranges for found in played.ranks[name]]
    shapes = {path: own[path][0] for own in ranges for path in own}
    for path, shape in shapes.items():
        parts = sorted(own[path][1:] for own in ranges if path in own)
        if path.endswith("/step"):
            assert set(parts) == {(0, 1)} and shape == (), path
            continue
        bounds = [bound for part in parts for bound in part]
        assert bounds[0] == 0 and bounds[-1] == math.prod(shape), path
        assert bounds[1:-1:2] == bounds[2::2], path


@every_job(lambda job: bool(job.start))
def test_every_bit_arrives(played: Story, name: str) -> None:
    before, after = played.tensors(played.jobs[name].start), played.tensors(name)
    assert before.keys() == after.keys()
    different = [path for path in before if not torch.equal(before[path], after[path])]
    assert different == []
    kinds = {path.rsplit("/", 1)[-1] for path in before if path.startswith("optimizer")}
    momentum = played.jobs[name].run == "momentum"
    assert kinds == ({"momentum_buffer"} if momentum else {"exp_avg", "exp_avg_sq", "step"})


@every_job()
def test_the_model_computes_with_what_is_saved(played: Story, name: str) -> None:
    ep, saved = played.jobs[name].ep, played.tensors(name)
    for path in played.ranks[name][0].held:
        parts = [found.held[path] for found in played.ranks[name]]
        whole = torch.cat(parts[:ep]) if ".experts." in path else parts[0]
        assert torch.equal(saved[f"model {path}"].to(whole.dtype), whole), path


@every_job()
def test_the_same_losses_follow(played: Story, story: int, name: str) -> None:
    run = played.jobs[name].run
    if run == "bf16":  # rounding differs between layouts
        expected = pytest.approx(played.ranks["bf16"][0].losses, abs=BF16_TOLERANCE)
    else:
        expected = pytest.approx(plain_losses(run, story), abs=TOLERANCE)
    for found in played.ranks[name]:
        assert found.losses == expected
    steps = set().union(*(found.adam_steps for found in played.ranks[name]))
    assert steps == (set() if run == "momentum" else {float(SAVED_AT + MORE)})


@pytest.mark.parametrize("story", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_expert_keeps_its_own_biases(played: Story) -> None:
    """DeepSpeed's own checkpoints of experts know `w1`, `w2` and `w3` only."""
    for path, alone in played.ranks["one-zero0"][0].held.items():
        if path.endswith("_bias"):
            apart = torch.cdist(alone, alone) + torch.eye(len(alone))
            assert len(alone) == 8 and apart.min() > 0.1
            spread = torch.cat([found.held[path] for found in played.ranks["fp32"]])
            assert torch.equal(alone, spread), path


def test_a_checkpoint_lists_the_experts_of_each_file(story_of_2: Story) -> None:
    manifest = checkpoint.read_manifest(story_of_2.folder / "fp32")
    held = {name: entry.get("experts") for name, entry in manifest["files"].items()}
    assert manifest["layout"] == {"world_size": 2, "zero_stage": 2, "expert_parallel_size": 2}
    assert held["model-00000-of-00002.safetensors"] == {"first": 0, "count": 4}
    assert held["model-00001-of-00002.safetensors"] == {"first": 4, "count": 4}


@pytest.mark.slow
def test_the_real_command_goes_on_at_another_layout(tiny: Path, tmp_path: Path) -> None:
    """Two processes with half of the experts each at stage 3; then one process at stage 1."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    overrides = ("model.channel.backend=deepspeed", "parallel.expert_parallel_size=2")
    result = launch(2, "--recipe", tiny / "tiny.yaml", "--run", whole, *overrides, stage=3)
    assert result.returncode == 0, result.stderr
    shutil.copytree(whole, resumed, symlinks=True)
    shutil.rmtree(resumed / "checkpoints" / "12")
    (resumed / "checkpoints" / "latest").write_text("8")
    (resumed / "summary.json").unlink()
    overrides = ("model.channel.backend=local", "parallel.expert_parallel_size=1")
    result = train("--resume", "--run", resumed, *overrides, stage=1)
    assert result.returncode == 0, result.stderr
    assert losses(resumed) == pytest.approx(losses(whole), abs=TOLERANCE)
    files = [
        checkpoint.open_tensors(run / "checkpoints" / "12", checkpoint.WEIGHTS)
        for run in (whole, resumed)
    ]
    for name in files[0].names:
        torch.testing.assert_close(files[1].read(name), files[0].read(name), rtol=0, atol=1e-4)
