"""MegaBlocks' dropless layer as a backend: equal to `local`, and what it relies on in MegaBlocks.

MegaBlocks' kernels run on the CPU in Triton's interpreter only, which has to be chosen before Triton is
imported: `make test-megablocks` does, and without it the tests that need the library skip on the CPU.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from backend_cases import (
    BF16_TOLERANCE,
    EXPERTS,
    KINDS,
    TOLERANCE,
    WIDTH,
    compare,
    config_of,
    draw_ids,
    kinds,
    route_to,
    step,
)
from references import assert_same, assert_steered_alike, gradients, leaves, randomise
from sra_ds.config import Recipe
from sra_ds.errors import BackendUnavailable
from sra_ds.model.language_model import build_model
from sra_ds.moe.backends import megablocks
from sra_ds.moe.backends.local import LocalBackend
from sra_ds.moe.backends.megablocks import MegaBlocksBackend, load_library
from sra_ds.moe.layer import Given, MoELayer
from sra_ds.moe.placement import WHOLE, Placement

pytestmark = pytest.mark.usefixtures("poisoned_memory")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Placement("megablocks")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where MegaBlocks can run; new modules and tensors are made there."""
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1: make test-megablocks")
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device, and no TRITON_INTERPRET")
    with torch.device(request.param):
        yield request.param


def backends(kind: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """(local, megablocks) with the same weights."""
    config = config_of(kind)
    local = randomise(LocalBackend(config, WIDTH, WHOLE), 0.5).to(dtype)
    ours = MegaBlocksBackend(config, WIDTH, HERE).to(dtype)
    ours.load_state_dict(local.state_dict())
    return [local, ours]


@kinds
@pytest.mark.parametrize(
    ("tokens", "top_k", "load"),
    [
        (1, 1, "mixed"),
        (1, EXPERTS, "mixed"),
        (63, 1, "all_on_one"),
        (63, 2, "one_empty"),
        (63, EXPERTS, "mixed"),
        (130, 1, "mixed"),
        (130, 2, "mixed"),
    ],
)
def test_values_and_every_gradient_equal_local(
    device: str, kind: dict[str, Any], tokens: int, top_k: int, load: str
) -> None:
    expected, actual = compare(backends(kind), tokens, top_k, load)
    assert_same(actual, expected, TOLERANCE)


@kinds
def test_bf16_equals_local_up_to_one_more_rounding(device: str, kind: dict[str, Any]) -> None:
    expected, actual = compare(backends(kind, torch.bfloat16), 63, 2, dtype=torch.bfloat16)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        furthest = (actual[name].float() - value.float()).abs().max()
        assert furthest <= BF16_TOLERANCE * value.float().abs().max(), name


def test_dropout_draws_what_local_draws(device: str) -> None:
    local, ours = backends({**KINDS[0], "dropout": 0.5})
    ids_TK, gates_TK, x_TD = draw_ids(63, 2), torch.rand(63, 2), torch.randn(63, WIDTH)
    found = []
    for module in (local, ours):
        torch.manual_seed(1)
        found.append(step(module.train(), x_TD, ids_TK, gates_TK, torch.ones_like(x_TD)))
    assert_same(found[1], found[0], TOLERANCE)
    evaluated = step(ours.eval(), x_TD, ids_TK, gates_TK, torch.ones_like(x_TD))
    assert not torch.allclose(evaluated["out"], found[1]["out"])


def test_top_k_may_change_from_call_to_call(device: str) -> None:
    modules = backends(KINDS[0])
    for top_k in (2, 1, EXPERTS, 2):
        expected, actual = compare(modules, 7, top_k)
        assert_same(actual, expected, TOLERANCE)


def test_inputs_may_have_any_strides(device: str) -> None:
    local, ours = backends(KINDS[0])
    x_TD = torch.randn(WIDTH, 7).T
    ids_TK = torch.arange(14).remainder(EXPERTS).view(7, 2)[:, :1]
    for gates_TK in (torch.rand(7, 2)[:, 1:], torch.rand(1, 1).expand(7, 1)):
        routing = route_to(ids_TK, gates_TK)
        torch.testing.assert_close(ours(x_TD, routing), local(x_TD, routing))


def test_autocast_changes_nothing(device: str) -> None:
    if device == "cpu":
        pytest.skip("MegaBlocks heeds autocast on CUDA only")
    _, ours = backends(KINDS[0])
    x_TD, routing = torch.randn(7, WIDTH), route_to(draw_ids(7, 2), torch.rand(7, 2))
    with torch.autocast(device, dtype=torch.bfloat16):
        inside_TD = ours(x_TD, routing)
    assert torch.equal(inside_TD, ours(x_TD, routing))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_placed_layer_takes_the_step_local_takes(device: str, recompute: bool) -> None:
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


@pytest.mark.parametrize("family", ["moe-cosine", "moe-swiglu-shared"])
def test_a_model_starts_and_learns_as_with_local(
    device: str, tiny_recipe: Callable[..., Recipe], family: str
) -> None:
    recipe = tiny_recipe(family)
    ids_BT, targets_BT = torch.randint(257, (2, 1, 13))
    found = []
    for placement in (WHOLE, HERE):
        model = build_model(recipe, device, placement)
        initial = {name: value.clone() for name, value in model.state_dict().items()}
        output = model.train()(ids_BT, targets_BT)
        output.loss_sum.backward()
        found.append((initial, {**gradients(model), "nll": output.token_nll_BT}))
    assert_same(found[1][0], found[0][0], 0.0)
    assert_same(found[1][1], found[0][1], TOLERANCE)


def test_a_compiled_layer_leaves_it_to_megablocks(device: str) -> None:
    layer = MoELayer(config_of(KINDS[0]), WIDTH)
    layer.place(HERE)
    compiled = copy.deepcopy(randomise(layer, 0.5))
    compiled.compile(backend="eager")
    x_TD = torch.randn(7, WIDTH)
    for module in (layer, compiled):
        module(x_TD)[0].square().sum().backward()
    assert_same(gradients(compiled), gradients(layer), TOLERANCE)


@kinds
def test_parameters_are_named_and_shaped_as_in_local(device: str, kind: dict[str, Any]) -> None:
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        ours = MegaBlocksBackend(config_of(kind), WIDTH, HERE)
        local = LocalBackend(config_of(kind), WIDTH, WHOLE)
    assert torch.equal(torch.random.get_rng_state(), state)
    shapes = {name: value.shape for name, value in local.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    assert [name for name, _ in ours.named_modules()] == ["", "experts"]
    (layer,) = ours.to_empty(device=device)._layer
    assert {id(p) for p in layer.parameters()} == {id(p) for p in ours.parameters()}


def test_nothing_stays_in_megablocks_after_a_step(device: str) -> None:
    _, ours = backends(KINDS[0])
    compare([ours.train()], 7, 2)
    from megablocks.layers import dmlp_registry, moe, router

    assert moe._LOAD_BALANCING_LOSS == router._ROUTER_LOGITS == []
    assert set(dmlp_registry._REGISTRY) == {"mlp", "glu"}
    with pytest.raises(ValueError):
        ours(torch.randn(7, WIDTH), route_to(draw_ids(6, 2), torch.rand(6, 2)))
    assert ours._layer[0].router.routing is None


def arguments_of(**fields: Any) -> Any:
    own = {"bf16": False, "fp16": False, "bias": False, "return_bias": False, "mlp_impl": "grouped"}
    sizes = {"hidden_size": WIDTH, "ffn_hidden_size": 128, "moe_num_experts": EXPERTS}
    return load_library().arguments(**own, **sizes, moe_top_k=2, moe_loss_weight=0, **fields)


def test_megablocks_routers_have_the_contract_ours_has(device: str) -> None:
    arguments = arguments_of(device=device)
    from megablocks.layers.router import LearnedRouter

    x_TD = torch.randn(7, WIDTH)
    ours = megablocks.DecidedRouter()
    theirs = LearnedRouter(arguments)(x_TD)
    ours.routing = route_to(theirs[2], theirs[1])
    for mine, other in zip(ours(x_TD), theirs, strict=True):
        assert (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device)


@pytest.mark.parametrize("memory_optimized", [False, True])
@pytest.mark.parametrize("network", ["mlp", "glu"])
def test_megablocks_own_experts_run_on_the_stand_ins(
    device: str, network: str, memory_optimized: bool
) -> None:
    arguments = arguments_of(device=device, mlp_type=network, memory_optimized_mlp=memory_optimized)
    layer = randomise(load_library().layer(arguments), 0.1)
    x_TD, loop_x_TD = leaves(*[torch.randn(7, WIDTH)] * 2)
    layer(x_TD).square().sum().backward()
    found = {**gradients(layer), "x": x_TD.grad}
    layer.zero_grad(set_to_none=True)
    weights = {n: p.view(EXPERTS, 128, WIDTH) for n, p in layer.experts.mlp.named_parameters()}
    _, gates_TK, ids_TK = layer.router(loop_x_TD)
    for t, x_D in enumerate(loop_x_TD):
        y_D = torch.zeros(WIDTH)
        for gate, e in zip(gates_TK[t], ids_TK[t], strict=True):
            hidden_F = arguments.activation_fn(weights["w1"][e] @ x_D)
            if network == "glu":
                hidden_F = hidden_F * (weights["v1"][e] @ x_D)
            y_D = y_D + gate * (hidden_F @ weights["w2"][e])
        y_D.square().sum().backward(retain_graph=True)
    assert_same(found, {**gradients(layer), "x": loop_x_TD.grad}, TOLERANCE)


@pytest.mark.parametrize("missing", ["megablocks.backend", "triton"])
def test_a_missing_library_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in ("megablocks.backend", missing):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailable, match="make megablocks"):
        MegaBlocksBackend(config_of(KINDS[0]), WIDTH, HERE)


def test_expert_parallelism_is_referred_to_deepspeed() -> None:
    with pytest.raises(BackendUnavailable, match=r"expert_parallel_size=2.*backend=deepspeed"):
        MegaBlocksBackend(config_of(KINDS[0]), WIDTH, Placement("megablocks", 2, 0))


def test_what_the_kernels_cannot_address_or_hold_is_refused(device: str) -> None:
    _, ours = backends(KINDS[0])
    routing = route_to(draw_ids(1, 2), torch.rand(1, 2))
    with pytest.raises(BackendUnavailable, match=r"float64.*backend=local"):
        ours(torch.randn(1, WIDTH, dtype=torch.float64), routing)
    with pytest.raises(BackendUnavailable, match=r"32 bits.*micro_batch_size"):
        ours(torch.randn(1, WIDTH).expand(2**27, WIDTH), routing)


ON_CPU = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_megablocks as tests
_, ours = tests.backends(tests.KINDS[0])
try:
    ours(torch.randn(3, 8), tests.route_to(tests.draw_ids(3, 2), torch.rand(3, 2)))
except tests.BackendUnavailable as error:
    print(error)
"""


@pytest.mark.parametrize("imported_early", [False, True])
def test_the_cpu_without_the_interpreter_is_refused(device: str, imported_early: bool) -> None:
    """Also when it is asked for after Triton was imported without it."""
    late = "import triton, os; os.environ['TRITON_INTERPRET'] = '1'" if imported_early else ""
    folder = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(folder.parent)}
    done = subprocess.run(
        [sys.executable, "-c", late + ON_CPU, str(folder)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "set TRITON_INTERPRET=1 before the start" in done.stdout


def test_every_steering_acts_as_on_the_local_backend(tiny_recipe, device):
    assert_steered_alike(tiny_recipe("moe-swiglu-shared"), (WHOLE, HERE), TOLERANCE, device)
