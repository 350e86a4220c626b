"""DeepSpeed's dispatch as a backend: equal to `local` in one process, and what it relies on.

Several processes are in `tests/training/test_expert_parallel.py`.
"""

from importlib.metadata import version
from typing import Any

import pytest
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.utils import (
    is_moe_param,
    split_params_into_different_moe_groups_for_optimizer,
    split_params_into_shared_and_expert_params,
)
from packaging.specifiers import SpecifierSet
from torch import nn

from backend_cases import (
    BF16_TOLERANCE,
    EMPTY,
    EXPERTS,
    KINDS,
    TOLERANCE,
    WIDTH,
    compare,
    config_of,
    draw_ids,
    kinds,
    route_to,
)
from references import assert_same, assert_steered_alike, randomise
from sra_ds.moe.backends.deepspeed import DeepSpeedBackend
from sra_ds.moe.backends.local import LocalBackend
from sra_ds.moe.layer import Given, MoELayer
from sra_ds.moe.placement import WHOLE, Placement

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HERE = Placement("deepspeed")
MARKS = {
    "allreduce": False,
    "group_name": "ep_size_1",
    "ds_zero_placement_family": "autoep_expert",
    "ds_zero_partition_group_name": "ep_size_1",
}


def backends(kind: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """(local, deepspeed) with the same weights, as a model makes them: without memory at first."""
    config = config_of(kind)
    local = randomise(LocalBackend(config, WIDTH, WHOLE), 0.5).to(dtype)
    with torch.device("meta"):
        ours = DeepSpeedBackend(config, WIDTH, HERE)
    ours = ours.to_empty(device="cpu").to(dtype)
    ours.load_state_dict(local.state_dict())
    return [local, ours]


@kinds
@pytest.mark.parametrize("tokens", [1, 63, 130])
@pytest.mark.parametrize(
    ("top_k", "load"),
    [(1, "mixed"), (2, "mixed"), (EXPERTS, "mixed"), (1, "all_on_one"), (2, "one_empty")],
)
def test_values_and_every_gradient_equal_local(
    kind: dict[str, Any], tokens: int, top_k: int, load: str
) -> None:
    expected, actual = compare(backends(kind), tokens, top_k, load)
    assert_same(actual, expected, TOLERANCE)
    if load != "mixed":  # the other rows are really used, and only they
        used = actual["experts.down_weight"].flatten(1).any(1).tolist()
        assert (
            used == [(e == EMPTY) == (load == "all_on_one") for e in range(EXPERTS)] or tokens == 1
        )


@kinds
def test_bf16_equals_local_up_to_rounding(kind: dict[str, Any]) -> None:
    expected, actual = compare(backends(kind, torch.bfloat16), 130, 2, dtype=torch.bfloat16)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        furthest = (actual[name].float() - value.float()).abs().max()
        assert furthest <= BF16_TOLERANCE * value.float().abs().max(), name


def test_top_k_may_change_from_call_to_call() -> None:
    modules = backends(KINDS[0])
    for top_k in (2, 1, EXPERTS, 2):
        expected, actual = compare(modules, 7, top_k)
        assert_same(actual, expected, TOLERANCE)


def test_a_call_leaves_no_routing_and_no_state_behind() -> None:
    _, ours = backends(KINDS[0])
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    compare([ours], 7, 2)
    assert ours.router.routing is None
    assert_same(ours.state_dict(), before, 0.0)


def test_inputs_may_have_any_strides() -> None:
    local, ours = backends(KINDS[0])
    x_TD = torch.randn(WIDTH, 7).T
    ids_TK = torch.arange(14).remainder(EXPERTS).view(7, 2)[:, :1]
    for gates_TK in (torch.rand(7, 2)[:, 1:], torch.rand(1, 1).expand(7, 1)):
        routing = route_to(ids_TK, gates_TK)
        torch.testing.assert_close(ours(x_TD, routing), local(x_TD, routing))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_placed_layer_takes_the_step_local_takes(recompute: bool) -> None:
    config = config_of(KINDS[0], shared_expert=KINDS[2])
    local, placed = MoELayer(config, WIDTH), MoELayer(config, WIDTH)
    placed.place(HERE)
    randomise(local, 0.5)
    placed.load_state_dict(local.state_dict())
    x_TD, weights_TD = torch.randn(2, 21, WIDTH)
    for layer in (local, placed):
        out_TD, facts = layer(x_TD, Given(recompute=recompute))
        routing = facts["routing"]
        ((out_TD * weights_TD).sum() + routing.mean_probs_E.square().sum()).backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert_same(placed.state_dict(), local.state_dict(), TOLERANCE)


@kinds
def test_state_is_named_and_shaped_as_in_local(kind: dict[str, Any]) -> None:
    with torch.device("meta"):
        ours = DeepSpeedBackend(config_of(kind), WIDTH, HERE)
        local = LocalBackend(config_of(kind), WIDTH, WHOLE)
    shapes = {name: value.shape for name, value in local.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    assert [name for name, _ in ours.named_parameters()] == list(shapes)


def test_building_draws_no_random_numbers() -> None:
    state = torch.random.get_rng_state()
    DeepSpeedBackend(config_of(KINDS[0]), WIDTH, HERE)
    assert torch.equal(torch.random.get_rng_state(), state)


def marks_of(parameter: nn.Parameter) -> dict[str, object]:
    return {name: getattr(parameter, name, None) for name in MARKS}


@kinds
def test_marks_survive_every_way_to_a_device_or_dtype(kind: dict[str, Any]) -> None:
    with torch.device("meta"):
        ours = nn.Sequential(DeepSpeedBackend(config_of(kind), WIDTH, HERE))
    changes = [
        lambda: ours.to_empty(device="cpu"),
        lambda: ours.to(torch.bfloat16),
        lambda: ours.bfloat16().float(),
        lambda: ours.to("cpu"),
    ]
    for change in [lambda: ours, *changes]:
        for name, parameter in change().named_parameters():
            assert marks_of(parameter) == MARKS, name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_placed_backend_holds_its_part_of_the_experts(rank: int) -> None:
    ours = DeepSpeedBackend(config_of(KINDS[0]), WIDTH, Placement("deepspeed", 2, rank))
    assert ours.experts.expert_ids == range(2 * rank, 2 * rank + 2)
    for parameter in ours.parameters():
        assert len(parameter) == 2
        assert marks_of(parameter)["group_name"] == "ep_size_2"


def test_this_deepspeed_is_one_the_adapter_was_written_for() -> None:
    assert version("deepspeed") in SpecifierSet(">=0.19.8,<0.20")


def test_the_layer_calls_router_and_experts_as_the_adapter_expects() -> None:
    """`router(x_TD, expert_bias) -> 3 tensors`, then `experts(rows, counts)`, whatever they are."""
    _, ours = backends(KINDS[0])
    calls: list[tuple[str, list[Any]]] = []
    for name in ("router", "experts"):
        module = ours.get_submodule(name)
        module.register_forward_pre_hook(
            lambda module, inputs, name=name: calls.append((name, list(inputs)))
        )
    ids_TK, x_TD = draw_ids(63, 2, "one_empty"), torch.randn(63, WIDTH)
    ours(x_TD, route_to(ids_TK, torch.rand(63, 2)))
    (first, (x_again_TD, expert_bias)), (second, (rows_RD, counts_E)) = calls
    assert [first, second] == ["router", "experts"]
    assert torch.equal(x_again_TD, x_TD) and expert_bias is None
    counted = torch.bincount(ids_TK.flatten(), minlength=EXPERTS)
    assert rows_RD.shape[1] == WIDTH and len(counts_E) == EXPERTS
    assert counts_E.sum() <= len(rows_RD)  # what follows is padding
    assert (counts_E.long() >= counted).all()
    for e, (start, count) in enumerate(zip(counts_E.cumsum(0) - counts_E, counts_E, strict=True)):
        own_RD = rows_RD[start : start + count]
        wanted_RD = x_TD[(ids_TK == e).any(1)]
        real_RD = own_RD[own_RD.any(1)]
        assert torch.equal(real_RD, wanted_RD), e


def test_the_layer_has_what_the_adapter_and_the_engine_touch() -> None:
    ours = DeepSpeedBackend(config_of(KINDS[0]), WIDTH, HERE)
    assert isinstance(ours, AutoEPMoELayer)
    assert ours._is_autoep_layer
    assert ours.ep_group is None and callable(ours.set_deepspeed_parallelism)
    assert ours.ep_group_name == "ep_size_1"
    assert ours.top_k == 2 and ours.score_apply == "post" and ours.shared_experts is None
    assert (ours.ep_size, ours.ep_rank, ours.num_experts, ours.num_local_experts) == (1, 0, 4, 4)
    assert [name for name, _ in ours.named_buffers()] == ["tokens_per_expert"]
    assert list(ours.state_dict()) == [name for name, _ in ours.named_parameters()]


def test_the_engine_tells_experts_by_their_marks() -> None:
    ours, dense = DeepSpeedBackend(config_of(KINDS[0]), WIDTH, HERE), nn.Linear(2, 2)
    experts, others = list(ours.parameters()), list(dense.parameters())
    assert all(map(is_moe_param, experts)) and not any(map(is_moe_param, others))
    shared, moe = split_params_into_shared_and_expert_params([*others, *experts])
    assert [*map(id, shared), *map(id, moe)] == [*map(id, others), *map(id, experts)]
    group = {"name": "decayed", "params": [*experts, *others], "weight_decay": 0.5}
    plain, placed = split_params_into_different_moe_groups_for_optimizer([group])
    assert [*map(id, plain["params"])] == [*map(id, others)]
    assert [*map(id, placed["params"])] == [*map(id, experts)]
    assert placed["moe"] and placed["name"] == "ep_size_1" and placed["weight_decay"] == 0.5


def test_every_steering_acts_as_on_the_local_backend(tiny_recipe):
    assert_steered_alike(tiny_recipe("moe-swiglu-shared"), (WHOLE, HERE), TOLERANCE)
