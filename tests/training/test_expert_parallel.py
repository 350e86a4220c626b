"""Experts spread over processes train as in one process of plain torch.

SGD, since Adam hides gradients of the wrong scale. DeepSpeed is imported once per number of processes:
all cases run in one start, and each test looks at its own.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distributed import (
    GELU,
    config_of,
    engine_step,
    enlarge,
    held_weights,
    open_engine,
    plain_step,
    recipe_of,
    run_ranks,
)
from sra_ds.config import Recipe, load_recipe
from sra_ds.config.loading import merge
from sra_ds.model import init
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.moe.placement import Placement
from sra_ds.seeds import generator
from sra_ds.training.engine import (
    build_optimizer,
    read_parameter,
    set_learning_rate,
    write_parameter,
)

STEPS = 20
TOLERANCE = 1e-5
"""Of every loss and every weight; rounding alone gives 2e-6."""
VISIBLE = 5e-4
"""What every parameter, and every expert of it, moves at least."""
SWIGLU = {"kind": "swiglu", "hidden": 16, "dropout": 0.0}

Found = dict[Any, Any]
"""What the cases came to on one process: of training by name, of writing by layout and precision."""


class Case(NamedTuple):
    """One run; equal to one process of plain torch unless it is bf16."""

    ep: int
    stage: int
    overlay: dict[str, Any] | None = None
    shipped: str = ""
    """A configuration to be taken as it is."""
    crowded: bool = False
    """All tokens go to the first two experts, so that most processes get none."""
    steps: int = 6

    def recipe(self) -> Recipe:
        return recipe_of(self.ep, self.overlay)

    def open(self) -> Any:
        return open_engine(self.recipe(), config_of(self.stage, self.shipped), self.prepare)

    def prepare(self, model: LanguageModel) -> None:
        enlarge(model)
        for router in model.routers() if self.crowded else []:
            router.selection_bias_E[:2] += 100


def training(**fields: Any) -> dict[str, Any]:
    return {"training": fields}


def expert(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": {"channel": {"expert": {**config, **fields}}}}


CLIPPED, ACCUMULATED = training(gradient_clipping=1.0), training(micro_batch_size=2)
RECOMPUTED, BF16 = training(activation_checkpointing=True), training(precision="bf16")
NO_BIAS = expert(GELU, bias=False)
SHARED = merge(expert(SWIGLU), {"model": {"channel": {"shared_expert": SWIGLU}}})

EQUAL_TWO = {
    **{f"ep{ep}-zero{s}": Case(ep, s, steps=STEPS) for ep in (1, 2) for s in range(4)},
    **{f"clipped-zero{s}": Case(2, s, CLIPPED) for s in (1, 2, 3)},
    **{f"accumulated-zero{s}": Case(2, s, ACCUMULATED) for s in (0, 2, 3)},
    **{f"recomputed-zero{s}": Case(2, s, RECOMPUTED) for s in (2, 3)},
    **{f"crowded-zero{s}": Case(2, s, crowded=True) for s in (0, 2, 3)},
    "no-bias-zero2": Case(2, 2, NO_BIAS),
    "swiglu-zero2": Case(2, 2, SHARED),
    "offload-zero2": Case(2, 2, shipped="zero2_offload.json"),
    "shipped-zero3": Case(2, 3, shipped="zero3.json"),
}
EQUAL_FOUR = {
    **{f"ep{ep}-zero{s}": Case(ep, s, steps=STEPS) for ep in (1, 2, 4) for s in range(4)},
    **{f"clipped-ep{ep}-zero{s}": Case(ep, s, CLIPPED) for ep in (2, 4) for s in (1, 2, 3)},
    **{f"crowded-ep{ep}-zero{s}": Case(ep, s, crowded=True) for ep in (2, 4) for s in (0, 2, 3)},
}
BF16_TWO = {f"bf16-ep{ep}-zero{s}": Case(ep, s, BF16) for ep in (1, 2) for s in (1, 2, 3)}
CASES = {2: {**EQUAL_TWO, **BF16_TWO}, 4: EQUAL_FOUR}

PRECISIONS = [*((s, "fp32") for s in range(4)), *((s, "bf16") for s in (1, 2, 3))]
WRITES = {
    world: [(ep, *layout) for ep in sizes for layout in PRECISIONS]
    for world, sizes in {2: (2,), 4: (2, 4)}.items()
}
"""(ep, stage, precision) in which weights are written from outside."""


def run_cases(world: int) -> Found:
    """All of them on this process."""
    trained = {name: train_case(case) for name, case in CASES[world].items()}
    return {**trained, **{layout: lost_writes(*layout) for layout in WRITES[world]}}


def train_case(case: Case) -> dict[str, Any]:
    recipe, engine = case.recipe(), case.open()
    steps = [engine_step(engine, recipe, number) for number in range(case.steps)]
    weights = held_weights(engine)
    if recipe.training.precision == "bf16":
        parameters = engine.module.named_parameters()
        weights = {name: safe_get_full_fp32_param(parameter) for name, parameter in parameters}
    engine.destroy()
    return {"steps": steps, "weights": weights}


def whole_weights(ranks: list[dict[str, Any]], ep: int) -> dict[str, Tensor]:
    """Every weight once; processes that hold the same agree to the last bit."""
    whole = {}
    for name in ranks[0]["weights"]:
        parts = [found["weights"][name] for found in ranks]
        different = ep if ".experts." in name else 1
        for rank, part in enumerate(parts):
            assert torch.equal(part, parts[rank % different]), (name, rank)
        whole[name] = torch.cat(parts[:different]) if different > 1 else parts[0]
    return whole


class Plain(NamedTuple):
    """A run of plain torch."""

    steps: list[tuple[float, float]]
    first: dict[str, Tensor]
    last: dict[str, Tensor]

    def moved(self, name: str) -> Tensor:
        """The furthest that any weight of each expert moved, or of the whole tensor."""
        change = (self.last[name] - self.first[name]).abs()
        return change.flatten(1).amax(1) if ".experts." in name else change.max()


def plain_run(case: Case, world: int) -> Plain:
    """The run that all layouts have to equal."""
    recipe = case.recipe()
    model = build_model(recipe)
    case.prepare(model)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, recipe)
    steps = [plain_step(model, optimizer, recipe, n, world) for n in range(case.steps)]
    return Plain(steps, first, {name: p.detach() for name, p in model.named_parameters()})


def far_apart(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> list[tuple[str, float]]:
    """The weights that differ by more, and by how much."""
    assert actual.keys() == expected.keys()
    found = [(name, float((actual[name] - expected[name]).abs().max())) for name in expected]
    return [(name, difference) for name, difference in found if not difference <= tolerance]


@pytest.fixture(scope="module")
def two() -> list[Found]:
    """Every case on two processes, by rank."""
    return run_ranks(2, run_cases, 2)


@pytest.fixture(scope="module")
def four() -> list[Found]:
    """Every case on four processes, by rank."""
    return run_ranks(4, run_cases, 4)


def assert_equals_plain(ranks: list[Found], name: str) -> None:
    case, found = CASES[len(ranks)][name], [results[name] for results in ranks]
    plain = plain_run(case, len(ranks))
    losses, norms = zip(*plain.steps, strict=True)
    for results in found:
        assert [loss for loss, _ in results["steps"]] == pytest.approx(losses, abs=TOLERANCE)
        assert [norm for _, norm in results["steps"]] == pytest.approx(norms, rel=TOLERANCE)
    assert min(norms) > 1.0 or "clip" not in name
    whole = whole_weights(found, case.ep)
    assert far_apart(whole, plain.last, TOLERANCE) == []
    assert case.crowded or [path for path in whole if (plain.moved(path) < VISIBLE).any()] == []


@pytest.mark.parametrize("name", EQUAL_TWO)
def test_two_processes_equal_one(two: list[Found], name: str) -> None:
    assert_equals_plain(two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL_FOUR)
def test_four_processes_equal_one(four: list[Found], name: str) -> None:
    assert_equals_plain(four, name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_learns_the_same_however_experts_are_spread(two: list[Found], stage: int) -> None:
    """Rounding differs by a fifth of a step here and there; a gradient twice as large would by all
    of it."""
    plain = plain_run(Case(1, stage), 2)
    steps = []
    for ep in (1, 2):
        found = [results[f"bf16-ep{ep}-zero{stage}"] for results in two]
        assert [loss for loss, _ in found[0]["steps"]] == pytest.approx(
            [loss for loss, _ in plain.steps], abs=0.2
        )
        weights = whole_weights(found, ep)
        steps.append({n: w - plain.first[n].bfloat16().float() for n, w in weights.items()})
    for name, step in steps[0].items():
        assert (steps[1][name] - step).norm() < 0.4 * step.norm(), name


WRITTEN = (
    "blocks.0.mixer.qkv.weight",
    "blocks.1.channel.moe.router.anchors",
    "blocks.0.channel.moe.backend.experts.up_weight",
    "blocks.1.channel.moe.backend.experts.down_bias",
)


def lost_writes(ep: int, stage: int, precision: str) -> list[str]:
    """The weights that were other than written, at once or after a step of learning rate 0."""
    case = Case(ep, stage, training(precision=precision))
    recipe, engine = case.recipe(), case.open()
    engine_step(engine, recipe, 0)
    set_learning_rate(engine, 0.0)
    first = engine.module.routed_layers()[0].backend.experts.expert_ids.start
    wanted, lost = {}, []
    for name in WRITTEN:
        parameter = engine.module.get_parameter(name)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        value = torch.rand(shape, generator=generator(0, name, first * (".experts." in name)))
        write_parameter(parameter, value)
        wanted[name] = value.to(parameter.dtype)
        if stage > 0 and not torch.equal(safe_get_full_fp32_param(parameter), value):
            lost.append(f"{name}, master copy")
    for when in ("at once", "after a step"):
        found = held_weights(engine)
        lost += [f"{n}, {when}" for n in WRITTEN if not torch.equal(found[n], wanted[n])]
        engine_step(engine, recipe, 1)
    engine.destroy()
    return lost


@pytest.mark.parametrize("layout", WRITES[2], ids=str)
def test_a_written_weight_survives_a_step(two: list[Found], layout: tuple[int, int, str]) -> None:
    assert [found[layout] for found in two] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("layout", WRITES[4], ids=str)
def test_a_written_weight_survives_a_step_of_four_processes(
    four: list[Found], layout: tuple[int, int, str]
) -> None:
    assert [found[layout] for found in four] == [[], [], [], []]


def padded_write() -> bool:
    """Whether 256 elements arrive that ZeRO-3 cuts into three shares of 86."""
    recipe = recipe_of(1, training(batch_size=9))
    engine = open_engine(recipe, config_of(3))
    parameter = engine.module.get_parameter(WRITTEN[1])
    value = torch.rand(parameter.ds_shape, generator=generator(0, "written"))
    write_parameter(parameter, value)
    return torch.equal(read_parameter(parameter), value)


def test_a_weight_is_written_whose_last_share_is_padded() -> None:
    assert run_ranks(3, padded_write) == [True] * 3


class Allocations(TorchDispatchMode):
    """Sizes of all tensors with memory that are made meanwhile, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self.sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_experts_of_other_processes_never_have_memory() -> None:
    """64 experts at 8 processes: the largest tensor ever made is the stack of the 8 held here."""
    overlay = {"model": {"width": 32, "channel": {"experts": 64, "expert": {"hidden": 128}}}}
    recipe = recipe_of(1, overlay)
    with Allocations() as whole:
        build_model(recipe, placement=Placement("deepspeed", 1, 0))
    with Allocations() as placed:
        model = build_model(recipe, placement=Placement("deepspeed", 8, 3))
    assert max(whole.sizes) == 64 * 32 * 128
    assert max(placed.sizes) == 8 * 32 * 128
    assert sum(p.numel() for p in model.parameters() if p.dim() == 3) == 2 * 2 * 8 * 32 * 128


def share_of_sra_8b() -> tuple[int, int]:
    """In a process of `run_ranks`: bytes of the parameters made here, and of memory needed meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_bytes("VmRSS")
    model = build_model(load_recipe("sra-8b"), "cpu", Placement("deepspeed", 8, 5))
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    return own, resident_bytes("VmHWM") - before


def resident_bytes(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


@pytest.mark.slow
def test_sra_8b_over_eight_processes_never_holds_all_experts_of_a_layer() -> None:
    channel, width = load_recipe("sra-8b").model.channel, load_recipe("sra-8b").model.width
    whole_layer = 4 * channel.experts * 2 * width * channel.expert.hidden
    ((own, peak),) = run_ranks(1, share_of_sra_8b)
    assert own < 8 * 2**30  # of 32 GB
    assert peak - own < whole_layer / 2


@pytest.mark.parametrize("name", ["sra-8b", "sra-128e"])
def test_a_large_model_makes_its_share_of_the_experts(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On the meta device: shapes, and the experts that initial weights are drawn for."""
    drawn: list[tuple[object, ...]] = []
    monkeypatch.setattr(init, "_normal", lambda weight, std, seed, *path: drawn.append(path))
    model = build_model(load_recipe(name), "meta", Placement("deepspeed", 8, 5))
    init.initialise(model, 0)
    experts = model.config.channel.experts
    held = range(5 * experts // 8, 6 * experts // 8)
    stacked = [p for layer in model.routed_layers() for p in layer.backend.parameters()]
    assert {len(parameter) for parameter in stacked} == {len(held)}
    assert {path[-1] for path in drawn if len(path) == 3} == set(held)
    matrices = sum(parameter.dim() == 3 for parameter in stacked)
    assert sum(len(path) == 3 for path in drawn) == matrices * len(held)
