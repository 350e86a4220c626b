"""The defects of the published SRA code (systems.md part C), trap by trap: none may come back."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import sra_ds
from references import randomise
from sra_ds.config import Recipe, dump_recipe
from sra_ds.config.loading import load_recipe
from sra_ds.config.losses import BalanceConfig, DispersionConfig, LossesConfig
from sra_ds.config.model import CosineRouterConfig, MoEChannelConfig
from sra_ds.data.loader import Batch
from sra_ds.errors import ConfigError
from sra_ds.losses import auxiliary_losses, balance_loss, dispersion_loss, total_loss
from sra_ds.metrics import is_dead
from sra_ds.model.counting import count_parameters
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.moe.layer import Given, MoELayer
from sra_ds.moe.routers import CosineRouter
from sra_ds.moe.routing import Routing, route
from sra_ds.ops.cosine_route import cosine_scores, normalized
from sra_ds.ops.extension import extension, use_kernels
from sra_ds.training.anchors import seed_anchors

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Builder = Callable[..., Recipe]
VOCABULARY = 257


def routed(
    router: dict[str, Any], top_k: int = 1, losses: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Overlay for `tiny_recipe`."""
    channel = {"router": router, "top_k": top_k}
    return {"model": {"channel": channel}, "losses": losses or {}}


def balance(**config: Any) -> Any:
    return TypeAdapter(BalanceConfig).validate_python(config)


def dispersion(kind: str) -> Any:
    return TypeAdapter(DispersionConfig).validate_python({"kind": kind, "weight": 1.0})


def batch(windows: int = 4, length: int = 16) -> tuple[Tensor, Tensor]:
    """(ids_BT, targets_BT)."""
    return tuple(torch.randint(VOCABULARY, (2, windows, length)))


def anchors_gradient(model: LanguageModel, loss: Tensor) -> float:
    """Largest entry of the anchors' gradients over all layers."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = [router.anchors.grad for router in model.routers()]
    return max(0.0 if g is None else float(g.abs().max()) for g in gradients)


def cosines(anchors_ED: Tensor) -> Tensor:
    """The anchors' gram matrix as the router reports it."""
    unit_ED = normalized(anchors_ED, anchors_ED.dtype)
    return unit_ED @ unit_ED.T


def test_trap_v1_1_at_k_1_only_the_gate_over_all_experts_teaches_anchors(
    tiny_recipe: Builder,
) -> None:
    reached = {}
    for gate in ("selected", "all", "straight_through"):
        model = build_model(tiny_recipe("moe-cosine", routed({"gate": gate})))
        reached[gate] = anchors_gradient(model, model(*batch()).loss_sum)
    assert reached["selected"] == 0
    assert reached["all"] > 1e-6 and reached["straight_through"] > 1e-6


def test_trap_v1_1_auxiliary_losses_still_move_anchors_the_language_model_cannot_reach(
    tiny_recipe: Builder,
) -> None:
    losses = {"balance": {"kind": "cv2", "weight": 0.4}}
    recipe = tiny_recipe("moe-cosine", routed({"gate": "selected"}, losses=losses))
    model = build_model(recipe)
    output = model(*batch())
    terms = auxiliary_losses(output.routings, output.penalties, recipe.losses, 1)
    assert anchors_gradient(model, total_loss(output.loss_sum, terms)) > 1e-6


def test_trap_v1_2_without_temperature_a_collapsed_stream_is_nearly_invisible_to_cv2() -> None:
    experts, width, cosine = 128, 512, 0.25
    basis_DD = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    anchors_ED = basis_DD[:experts]
    rest_D = torch.randn(width, dtype=torch.float64)
    rest_D = rest_D - (rest_D @ anchors_ED[0]) * anchors_ED[0]
    token_D = cosine * anchors_ED[0] + (1 - cosine**2) ** 0.5 * rest_D / rest_D.norm()
    stream_TD = token_D.expand(64, width)

    def routing(temperature: float) -> Routing:
        scores_TE = cosine_scores(stream_TD, anchors_ED, token_D.new_tensor([temperature]))
        return route(scores_TE, 1, "all")

    cv2 = balance(kind="cv2", weight=0.4)
    flat, sharp = routing(1.0), routing(10.0)
    assert flat.load_E[0] == 64 and flat.load_E[1:].sum() == 0  # one expert gets everything
    assert float(flat.mean_probs_E.max()) == pytest.approx(0.010, abs=5e-4)
    assert 1 / experts == pytest.approx(0.0078, abs=5e-5)
    assert float(balance_loss(flat, cv2)) == pytest.approx(0.30, abs=0.05)
    assert float(balance_loss(flat, cv2)) / experts == pytest.approx(0.0024, abs=4e-4)
    assert float(balance_loss(sharp, cv2)) > 100 * float(balance_loss(flat, cv2))


@pytest.mark.parametrize("experts", [2, 8, 128])
def test_trap_v1_3_antipodal_clusters_minimise_the_signed_dispersion_only(experts: int) -> None:
    direction_D = torch.randn(16, dtype=torch.float64)
    signs_E = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(experts // 2)
    gram_EE = cosines(signs_E[:, None] * direction_D)
    signed = float(dispersion_loss(gram_EE, dispersion("signed")))
    squared = float(dispersion_loss(gram_EE, dispersion("squared")))
    assert signed == pytest.approx(-1 / (experts - 1), rel=1e-12)
    assert squared == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("experts", [2, 5, 40])
def test_trap_v1_3_signed_dispersion_sees_nothing_but_the_sum_of_anchors(experts: int) -> None:
    anchors_ED = torch.randn(experts, 16, dtype=torch.float64)
    units_ED = anchors_ED / anchors_ED.norm(dim=1, keepdim=True)
    identity = (units_ED.sum(0).square().sum() - experts) / (experts * (experts - 1))
    signed = dispersion_loss(cosines(anchors_ED), dispersion("signed"))
    torch.testing.assert_close(signed, identity, rtol=1e-12, atol=1e-12)


def test_trap_v1_3_orthogonal_anchors_have_no_dispersion_of_either_form() -> None:
    anchors_ED = 3 * torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q[:8]
    for kind in ("signed", "squared"):
        assert abs(float(dispersion_loss(cosines(anchors_ED), dispersion(kind)))) < 1e-15


def test_trap_v1_3_squared_dispersion_pushes_two_near_anchors_apart() -> None:
    anchors_ED = torch.tensor([[1.0, 0.0], [0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    dispersion_loss(cosines(anchors_ED), dispersion("squared")).backward()
    assert anchors_ED.grad is not None
    step_ED = anchors_ED - 0.1 * anchors_ED.grad
    assert cosines(step_ED)[0, 1] < cosines(anchors_ED)[0, 1]


def test_trap_v1_4_the_linear_router_runs_and_has_no_anchors(tiny_recipe: Builder) -> None:
    recipe = tiny_recipe("moe-linear", routed({"gate": "all"}))
    model = build_model(recipe)
    output = model(*batch())
    output.loss_sum.backward()
    assert output.loss_sum.isfinite()
    assert not any("anchor" in name for name in model.state_dict())
    assert output.anchor_grams == []
    assert all(routing.temperature is None for routing in output.routings)
    dispersion = LossesConfig(dispersion={"kind": "signed", "weight": 0.6})
    assert auxiliary_losses(output.routings, output.penalties, dispersion, 1) == {}
    with pytest.raises(ConfigError, match="needs a router with anchors"):
        tiny_recipe("moe-linear", {"losses": {"dispersion": {"kind": "signed", "weight": 0.6}}})


def test_trap_v1_4_random_anchors_are_frozen_saved_and_reported_as_they_are(
    tiny_recipe: Builder,
) -> None:
    router = {"kind": "random", "temperature": 7.0}
    losses = {"balance": {"kind": "cv2", "weight": 0.4}}
    recipe = tiny_recipe("moe-cosine", routed(router, 2, losses))
    model = build_model(recipe)
    anchors = [router.anchors.clone() for router in model.routers()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    output = model(*batch())
    terms = auxiliary_losses(output.routings, output.penalties, recipe.losses, 1)
    total_loss(output.loss_sum, terms).backward()
    optimizer.step()
    assert not any("router" in name for name, _ in model.named_parameters())
    assert count_parameters(model)["total_by_part"]["router"] == 0
    for number, (router, before_ED, routing) in enumerate(
        zip(model.routers(), anchors, output.routings, strict=True)
    ):
        assert torch.equal(router.anchors, before_ED)
        assert f"blocks.{number}.channel.moe.router.anchors" in model.state_dict()
        assert not routing.anchor_gram_EE.requires_grad and routing.temperature == 7.0
        torch.testing.assert_close(routing.anchor_gram_EE, cosines(before_ED), rtol=0, atol=0)


def test_trap_v1_5_routers_and_experts_read_the_channel_norm_output(
    tiny_recipe: Builder, routed_family: str
) -> None:
    model = build_model(tiny_recipe(routed_family))
    seen: dict[str, list[Tensor]] = {"norm": [], "router": [], "backend": []}
    for block in model.blocks:
        block.channel_norm.register_forward_hook(lambda m, a, out: seen["norm"].append(out))
        moe = block.channel.moe
        moe.router.register_forward_pre_hook(lambda m, a: seen["router"].append(a[0]))
        reader = moe if moe.config.opened else moe.backend  # which reads routes by another method
        reader.register_forward_pre_hook(lambda m, a: seen["backend"].append(a[0]))
    model(batch()[0])
    assert len(seen["norm"]) == len(seen["router"]) == len(model.blocks)
    for norm_BTD, router_TD, backend_TD in zip(*seen.values(), strict=True):
        assert torch.equal(norm_BTD.flatten(0, 1), router_TD)
        assert torch.equal(norm_BTD.flatten(0, 1), backend_TD)


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "cv2"},
        {"kind": "switch"},
        {"kind": "bandpass", "low": 0.16, "high": 0.17},
        {"kind": "elastic"},
        {"kind": "cv2", "of": "load"},
        {"kind": "bandpass", "low": 0.16, "high": 0.17, "of": "load"},
        {"kind": "elastic", "of": "load"},
    ],
    ids=str,
)
def test_trap_v1_6_padding_changes_no_balance_loss_load_or_dead_count(
    config: dict[str, Any],
) -> None:
    router = randomise(CosineRouter(CosineRouterConfig(temperature="fixed"), 8, 6, 2)).double()
    tokens_TD = torch.randn(60, 8, dtype=torch.float64)
    padding_TD = torch.ones(20, 8, dtype=torch.float64)  # 25 % of all tokens, as published
    valid_T = torch.arange(80) < 60
    alone = router(tokens_TD)
    padded = router(torch.cat([tokens_TD, padding_TD]), valid_T)
    counted = router(torch.cat([tokens_TD, padding_TD]))
    loss = balance(weight=1.0, **config)
    near = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(balance_loss(padded, loss), balance_loss(alone, loss), **near)
    assert (balance_loss(counted, loss) - balance_loss(alone, loss)).abs() > 1e-3
    assert torch.equal(padded.load_E, alone.load_E)
    for tokens in (None, float(alone.valid_count)):
        assert torch.equal(is_dead(padded.load_E, tokens), is_dead(alone.load_E, tokens))
    assert padded.valid_count == alone.valid_count


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize(("kind", "products"), [("gelu", 2), ("swiglu", 3)])
@pytest.mark.parametrize("router", ["cosine", "linear", "hash"])
def test_trap_v1_7_the_work_is_the_same_few_calls_whatever_the_number_of_experts(
    kind: str, products: int, router: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with use_kernels(kernels):
        compiled = "cpu" in extension().devices
        check_calls(kind, 0 if compiled else products, router, monkeypatch)


def check_calls(kind: str, products: int, router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor's values were read by the host")

    products_run: list[Any] = []
    grouped_mm = functional.grouped_mm

    def counted(*arguments: Any, **options: Any) -> Tensor:
        products_run.append(None)
        return grouped_mm(*arguments, **options)

    monkeypatch.setattr(functional, "grouped_mm", counted)
    forward, backward = {}, {}
    for experts in (12, 16, 32):  # more than the width
        expert = {"kind": kind, "hidden": 16, "dropout": 0.0}
        config = MoEChannelConfig(experts=experts, top_k=2, expert=expert, router=router)
        layer = randomise(MoELayer(config, 8))
        x_TD, ids_T = torch.randn(63, 8, requires_grad=True), torch.arange(63)
        weights_TD = torch.randn(63, 8)
        with monkeypatch.context() as patch:
            for reader in ("tolist", "item", "__bool__", "__int__", "__index__", "__float__"):
                patch.setattr(Tensor, reader, refuse)
            products_run.clear()
            with Calls() as calls:
                out_TD, _ = layer(x_TD, Given(token_ids_T=ids_T))
            assert len(products_run) == products
            with Calls() as backward_calls:
                out_TD.backward(weights_TD)
            assert len(products_run) == 3 * products
        forward[experts], backward[experts] = sorted(calls.names), sorted(backward_calls.names)
        assert "_local_scalar_dense" not in calls.names + backward_calls.names
    assert forward[12] == forward[16] == forward[32]
    assert backward[12] == backward[16] == backward[32]


def test_trap_v2_1_the_hidden_size_of_the_recipe_is_the_one_that_is_built(
    tiny_recipe: Builder,
) -> None:
    expert = {"kind": "gelu", "hidden": 24}
    overlay = {"model": {"channel": {"expert": expert, "shared_expert": {**expert, "hidden": 40}}}}
    model = build_model(tiny_recipe("moe-cosine", overlay))
    for block in model.blocks:
        moe = block.channel.moe
        assert moe.backend.experts.up_weight.shape == (4, 32, 24)
        assert moe.backend.experts.down_weight.shape == (4, 24, 32)
        assert moe.shared_expert.up.weight.shape == (40, 32)
    dense = {"kind": "dense", "feed_forward": {"kind": "swiglu", "hidden": 56}}
    model = build_model(tiny_recipe("dense", {"model": {"channel": dense}}))
    assert model.blocks[0].channel.feed_forward.up.weight.shape == (56, 32)


@pytest.mark.parametrize("gate", ["all", "straight_through", "selected"])
def test_trap_v2_2_the_single_gate_is_a_small_probability_or_exactly_one(
    gate: str, tiny_recipe: Builder
) -> None:
    overlay = routed({"gate": gate})
    overlay["model"] |= {"width": 128, "channel": {**overlay["model"]["channel"], "experts": 64}}
    model = build_model(tiny_recipe("moe-cosine", overlay))
    output = model(*batch())
    gates_NT1 = torch.stack([routing.gates_TK for routing in output.routings])
    if gate == "all":
        assert gates_NT1.max() < 0.5 and gates_NT1.mean() < 0.15
    else:
        assert (gates_NT1 == 1).all()
    assert (anchors_gradient(model, output.loss_sum) > 1e-7) == (gate != "selected")


@pytest.mark.parametrize("training", [True, False])
def test_trap_v2_3_a_forward_pass_never_seeds_anchors(tiny_recipe: Builder, training: bool) -> None:
    recipe = tiny_recipe("moe-cosine", routed({"anchors": "data"}, 2))
    seeded = build_model(recipe)
    ids_BT, targets_BT = batch()
    seed_anchors(seeded, seeded, Batch(ids_BT, targets_BT, torch.zeros_like(ids_BT)), seed=1)
    loaded = build_model(recipe)
    loaded.load_state_dict(seeded.state_dict())
    loaded.train(training)
    loaded(*batch()).loss_sum.backward()
    expected = seeded.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_trap_v2_3_only_the_start_of_a_run_seeds_anchors() -> None:
    root = Path(sra_ds.__file__).parent
    users = {
        file.relative_to(root).parts[0]
        for file in root.rglob("*.py")
        if re.search(r"\bseed_anchors\b", file.read_text(encoding="utf-8"))
    }
    assert users == {"training", "workflow"}


def test_trap_v2_3_seeded_anchors_are_normalised_router_inputs_of_valid_tokens(
    tiny_recipe: Builder,
) -> None:
    recipe = tiny_recipe("moe-cosine", routed({"anchors": "data"}, 2))
    ids_BT, targets_BT = batch()
    valid_BT = torch.arange(16).expand(4, 16) < 10
    first = Batch(ids_BT, targets_BT, torch.zeros_like(ids_BT), valid_BT)
    models = [build_model(recipe), build_model(recipe)]
    for model in models:
        seed_anchors(model, model, first, seed=1)
    inputs: list[Tensor] = []
    for router, twin in zip(*[model.routers() for model in models], strict=True):
        assert torch.equal(router.anchors, twin.anchors)
        router.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    models[0].eval()(*first)
    for router, x_TD in zip(models[0].routers(), inputs, strict=True):
        units_TD = functional.normalize(x_TD[valid_BT.flatten()], dim=-1)
        best_E = (router.anchors @ units_TD.T).max(-1)
        torch.testing.assert_close(best_E.values, torch.ones(4), rtol=0, atol=1e-5)
        assert len(set(best_E.indices.tolist())) == 4
    valid_BT = torch.arange(16).expand(4, 16) < torch.tensor([[3], [0], [0], [0]])
    with pytest.raises(ConfigError, match="experts=4"):
        seed_anchors(models[1], models[1], first._replace(valid_BT=valid_BT), seed=1)


def test_trap_v2_4_deliberate_zeros_stay_zeros(tiny_recipe: Builder, tmp_path: Path) -> None:
    zeros = {
        "training": {
            "seed": 0,
            "gradient_clipping": 0,
            "micro_batch_size": 0,
            "selection_bias_rate": 0,
            "optimizer": {"kind": "adamw", "weight_decay": 0, "betas": [0, 0]},
            "schedule": {"kind": "cosine", "warmup_steps": 0, "final": 0},
        },
        "losses": {
            "balance": {"kind": "bandpass", "weight": 0, "low": 0, "high": 0},
            "dispersion": {"kind": "signed", "weight": 0},
            "z_weight": 0,
        },
        "model": {
            "embedding": {"kind": "token", "dropout": 0},
            "mixer": {"kind": "attention", "heads": 2, "dropout": 0},
            "channel": {
                "router": {"kind": "cosine", "noise": 0},
                "expert": {"kind": "gelu", "hidden": 16, "dropout": 0},
            },
        },
        "evaluation": {"every": 0, "max_tokens": 0},
        "checkpoint": {"every": 0},
        "logging": {"sample_tokens": 0},
    }
    recipe = tiny_recipe("moe-cosine", zeros)
    file = tmp_path / "zeros.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    for read in (recipe, load_recipe(file), load_recipe(file, ["training.steps=7"])):
        training, losses = read.training, read.losses
        assert training.gradient_clipping == 0 and training.optimizer.weight_decay == 0
        assert training.optimizer.betas == (0, 0) and training.selection_bias_rate == 0
        assert losses.balance.weight == losses.balance.low == losses.balance.high == 0
        assert losses.dispersion.weight == losses.z_weight == 0
        model = build_model(read)
        assert model.embedding.dropout == model.blocks[0].mixer.config.dropout == 0
        assert model.blocks[0].channel.moe.backend.experts.dropout == 0
        assert all(router.config.noise == 0 for router in model.routers())
        output = model.train()(*batch())
        terms = auxiliary_losses(output.routings, output.penalties, losses, 1)
        assert "z" not in terms
        assert all(weight == 0 for _, weight in terms.values())
        assert total_loss(output.loss_sum, terms) == output.loss_sum


def test_trap_v2_5_the_corridor_on_probabilities_is_blind_to_a_skewed_load() -> None:
    experts = 8
    preference_E = torch.zeros(experts, dtype=torch.float64)
    preference_E[0] = 0.01
    scores_TE = preference_E.repeat(64, 1).requires_grad_()
    routing = route(scores_TE, 1, "all")
    assert routing.load_E.tolist() == [64] + [0] * 7
    corridor = {"kind": "bandpass", "weight": 0.4, "low": 0.1, "high": 0.2}
    blind = balance_loss(routing, balance(of="probs", **corridor))
    seeing = balance_loss(routing, balance(of="load", **corridor))
    assert blind == 0
    assert float(seeing.detach()) == pytest.approx(8**2 * (0.8**2 + 7 * 0.1**2) / 8, rel=1e-12)
    (gradient_TE,) = torch.autograd.grad(seeing, scores_TE)
    assert (gradient_TE[:, 0] > 0).all() and (gradient_TE[:, 1:] < 0).all()
