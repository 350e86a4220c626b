"""Every layout that is impossible or would train wrongly is refused with its reason."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from commands import ROOT, TRAIN, call
from sra_ds.config import Recipe
from sra_ds.errors import ConfigError
from sra_ds.moe.placement import WHOLE, Placement
from sra_ds.training.placement import choose_placement

Builder = Callable[..., Recipe]
ZERO: list[dict[str, Any]] = [{"zero_optimization": {"stage": stage}} for stage in range(4)]
UNCLIPPED = {"training": {"gradient_clipping": 0.0}}


def placed(size: int, backend: str = "deepspeed", **overlay: Any) -> dict[str, Any]:
    """Overlay for `tiny_recipe`, whose routed families have 4 experts."""
    channel = {"backend": backend}
    return {
        "parallel": {"expert_parallel_size": size},
        "model": {"channel": channel},
        **overlay,
    }


def choose(recipe: Recipe, ds_config: dict[str, Any], world: int = 4, rank: int = 3) -> Any:
    return choose_placement(recipe, ds_config, "my.json", world, rank)


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_are_dealt_to_the_experts_in_turn(tiny_recipe: Builder, size: int, rank: int) -> None:
    recipe = tiny_recipe("moe-cosine", placed(size))
    placement = choose(recipe, ZERO[2], 4, rank)
    assert placement == Placement("deepspeed", size, rank % size)
    held = [choose(recipe, ZERO[2], 4, r).expert_ids(4) for r in range(size)]
    assert [e for ids in held for e in ids] == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", ["local", "deepspeed", "megablocks"])
def test_one_process_holds_all_experts_with_any_backend(tiny_recipe: Builder, backend: str) -> None:
    recipe = tiny_recipe("moe-cosine", placed(1, backend))
    assert choose(recipe, ZERO[0]) == Placement(backend, 1, 0)


def test_auto_is_settled_later_unless_experts_are_spread(tiny_recipe: Builder) -> None:
    assert choose(tiny_recipe("moe-cosine", placed(1, "auto")), ZERO[2]) is None
    spread = choose(tiny_recipe("moe-cosine", placed(2, "auto")), ZERO[2])
    assert spread == Placement("deepspeed", 2, 1)


def test_a_dense_model_has_nothing_to_place(tiny_recipe: Builder) -> None:
    assert choose(tiny_recipe("dense"), ZERO[3]) == WHOLE


QUANTIZED = {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}
HIERARCHICAL = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
ORDERED = {**ZERO[2], "use_data_before_expert_parallelism": True}
REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], int, list[str]]] = {
    "another backend": (
        placed(2, "local"), ZERO[2], 4,
        ["parallel.expert_parallel_size=2", "model.channel.backend=deepspeed", "local"],
    ),
    "megablocks": (
        placed(2, "megablocks"), ZERO[2], 4, ["model.channel.backend=deepspeed", "megablocks"]
    ),
    "processes": (
        placed(2), ZERO[2], 3,
        ["parallel.expert_parallel_size=2", "does not divide the 3 process(es)"],
    ),
    "too few processes": (placed(2), ZERO[2], 1, ["does not divide the 1 process(es)"]),
    "experts": (
        placed(3), ZERO[2], 6,
        ["parallel.expert_parallel_size=3", "does not divide model.channel.experts=4"],
    ),
    "more processes than experts": (placed(8), ZERO[2], 8, ["model.channel.experts=4"]),
    "clipping at stage 0": (
        placed(2), ZERO[0], 4,
        ["my.json", "stage 0", "ds_configs/zero1.json", "training.gradient_clipping=0"],
    ),
    "no stage is stage 0": (placed(2), {}, 4, ["my.json", "stage 0"]),
    "order of processes": (placed(2), ORDERED, 4, ["my.json: use_data_before_expert_parallelism"]),
    "hpz": (placed(2), HIERARCHICAL, 4, ["my.json: zero_hpz_partition_size"]),
    "quantized": (placed(2), QUANTIZED, 4, ["zero_quantized_gradients"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_work_is_refused_with_the_reason(tiny_recipe: Builder, name: str) -> None:
    overlay, ds_config, world, reasons = REFUSALS[name]
    with pytest.raises(ConfigError) as caught:
        choose(tiny_recipe("moe-cosine", overlay), ds_config, world, 0)
    assert "\n" not in str(caught.value)
    for reason in reasons:
        assert reason in str(caught.value)


def test_a_dense_model_cannot_be_spread_by_experts(tiny_recipe: Builder) -> None:
    recipe = tiny_recipe("dense", {"parallel": {"expert_parallel_size": 2}})
    with pytest.raises(ConfigError, match=r"expert_parallel_size=2 needs model.channel.kind=moe"):
        choose(recipe, ZERO[2])


@pytest.mark.parametrize("ds_config", [ORDERED, HIERARCHICAL, QUANTIZED, ZERO[0]])
def test_one_process_per_expert_set_may_do_what_several_may_not(
    tiny_recipe: Builder, ds_config: dict[str, Any]
) -> None:
    assert choose(tiny_recipe("moe-cosine", placed(1)), ds_config).size == 1


@pytest.mark.parametrize("stage", range(4))
def test_every_stage_is_allowed_without_clipping(tiny_recipe: Builder, stage: int) -> None:
    assert choose(tiny_recipe("moe-cosine", placed(2, **UNCLIPPED)), ZERO[stage]).size == 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipping_is_allowed_where_it_is_right(tiny_recipe: Builder, stage: int) -> None:
    recipe = tiny_recipe("moe-cosine", placed(2))
    assert recipe.training.gradient_clipping > 0 and choose(recipe, ZERO[stage]).size == 2


def test_the_command_refuses_in_one_line(tiny: Any, tmp_path: Any) -> None:
    result = call(
        sys.executable, TRAIN, "--deepspeed", ROOT / "ds_configs" / "zero2.json",
        "--recipe", tiny / "tiny.yaml", "--run", tmp_path / "run",
        "model.channel.backend=deepspeed", "parallel.expert_parallel_size=2",
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: parallel.expert_parallel_size=2 does not divide the 1 process")
    assert result.stdout == "" and not (tmp_path / "run").exists()
