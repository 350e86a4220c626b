"""Initial weights: a function of (seed, name, expert) alone, at the published scales."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sra_ds.config import Recipe
from sra_ds.config.loading import merge
from sra_ds.model.language_model import build_model
from sra_ds.seeds import generator

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Builder = Callable[..., Recipe]
ROUTERS: list[dict[str, Any]] = [
    *({"kind": "cosine", "temperature": t} for t in ("none", "fixed", "global", "per_expert")),
    *({"kind": "cosine", "anchors": anchors} for anchors in ("kaiming", "data")),
    {"kind": "linear", "bias": True},
    {"kind": "random"},
    {"kind": "hash"},
]


def state(recipe: Recipe) -> dict[str, Tensor]:
    return build_model(recipe).state_dict()


def with_experts(experts: int) -> dict[str, Any]:
    return {"model": {"channel": {"experts": experts}}}


def test_an_expert_does_not_depend_on_how_many_others_there_are(
    tiny_recipe: Builder, routed_family: str
) -> None:
    top_k = {"model": {"channel": {"top_k": 8}}} if routed_family == "moe-block" else {}
    four = state(tiny_recipe(routed_family, with_experts(4)))
    eight = state(tiny_recipe(routed_family, merge(with_experts(8), top_k)))
    stacked = [name for name in four if ".backend.experts." in name]
    assert len(stacked) >= 6
    for name in stacked:
        assert torch.equal(four[name], eight[name][:4])
    for name in four:
        by_number = (".moe.router.", ".moe.coupling.", ".ghosts.")
        if not any(part in name for part in by_number) and name not in stacked:
            assert torch.equal(four[name], eight[name]), name


def test_parts_do_not_depend_on_each_other(tiny_recipe: Builder) -> None:
    dense, routed = state(tiny_recipe("dense")), state(tiny_recipe("moe-cosine"))
    shared = [name for name in dense if name in routed]
    assert {"embedding.weight", "blocks.0.mixer.qkv.weight"} <= set(shared)
    assert all(torch.equal(dense[name], routed[name]) for name in shared)


def test_depth_changes_the_residual_projections_by_their_scale_only(tiny_recipe: Builder) -> None:
    shallow, deep = state(tiny_recipe()), state(tiny_recipe(overlay={"model": {"layers": 8}}))
    for name, value in shallow.items():
        factor = 2.0 if name.endswith(("mixer.out.weight", "down_weight")) else 1.0
        torch.testing.assert_close(value, factor * deep[name], rtol=1e-6, atol=0)


def test_the_seed_decides_and_the_global_generator_does_not(
    tiny_recipe: Builder, family: str
) -> None:
    torch.manual_seed(1)
    first = state(tiny_recipe(family))
    torch.manual_seed(2)
    second = state(tiny_recipe(family))
    other = state(tiny_recipe(family, {"training": {"seed": 1}}))
    assert all(torch.equal(first[name], second[name]) for name in first)
    random = [
        name
        for name, value in first.items()
        if value.unique().numel() > 1 and not name.endswith("learned_K")  # taps of a wavelet
    ]
    assert random
    assert all(not torch.equal(first[name], other[name]) for name in random)


def test_every_tensor_and_every_expert_draws_numbers_of_its_own(
    tiny_recipe: Builder, family: str
) -> None:
    weights: dict[str, Tensor] = {}
    for name, value in state(tiny_recipe(family)).items():
        if name.endswith(("_weight",)):
            weights |= {f"{name}/{e}": row for e, row in enumerate(value)}
        elif value.ndim == 2 and value.std() > 0:
            weights[name] = value
    firsts = [round(float(value.flatten()[0] / value.std()), 4) for value in weights.values()]
    assert len(set(firsts)) == len(firsts)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: "-".join(map(str, r.values())))
@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
def test_no_uninitialised_value_is_left(
    tiny_recipe: Builder, router: dict[str, Any], expert: str
) -> None:
    feed_forward = {"kind": expert, "hidden": 16}
    channel = {"router": router, "expert": feed_forward, "shared_expert": feed_forward}
    model = build_model(tiny_recipe("moe-cosine", {"model": {"channel": channel}}))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert tensors
    for name, value in tensors:
        assert value.isfinite().all(), name


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
def test_standard_deviations(tiny_recipe: Builder, layers: int, expert: str) -> None:
    feed_forward = {"kind": expert, "hidden": 128}
    channel = {"expert": feed_forward, "shared_expert": feed_forward, "router": {"kind": "linear"}}
    overlay = {"model": {"width": 128, "layers": layers, "channel": channel}}
    residual = 0.02 / (2 * layers) ** 0.5
    for name, value in state(tiny_recipe("moe-cosine", overlay)).items():
        if "norm" in name:
            assert (value == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith(("bias", "bias_E")):
            assert not value.any(), name
        else:
            into_stream = name.endswith(("down_weight", "down.weight", "mixer.out.weight"))
            expected = residual if into_stream else 0.02
            error = 5 * expected / (2 * value.numel()) ** 0.5
            assert float(value.std()) == pytest.approx(expected, abs=error), name
            assert abs(float(value.mean())) < 5 * expected / value.numel() ** 0.5, name


@pytest.mark.parametrize(
    "router", [{"kind": "cosine"}, {"kind": "random"}], ids=["cosine", "random"]
)
def test_anchors_are_orthonormal(tiny_recipe: Builder, router: dict[str, Any]) -> None:
    for experts in (8, 32, 48):
        channel = {"experts": experts, "router": router}
        model = build_model(tiny_recipe("moe-cosine", {"model": {"channel": channel}}))
        first, second = (r.anchors for r in model.routers())
        gram = first @ first.T if experts <= 32 else first.T @ first
        torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
        assert not torch.equal(first, second)


def test_kaiming_anchors_are_uniform_within_their_bound(tiny_recipe: Builder) -> None:
    channel = {"experts": 256, "router": {"kind": "cosine", "anchors": "kaiming"}}
    model = build_model(tiny_recipe("moe-cosine", {"model": {"channel": channel}}))
    anchors, bound = model.routers()[0].anchors, 32**-0.5
    assert 0.99 * bound < anchors.abs().max() <= bound
    assert float(anchors.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.03)


@pytest.mark.parametrize(
    ("temperature", "expected"), [("none", 1), ("fixed", 7), ("global", 7), ("per_expert", 7)]
)
def test_temperature_starts_at_the_configured_value(
    tiny_recipe: Builder, temperature: str, expected: float
) -> None:
    router = {"kind": "cosine", "temperature": temperature, "initial_temperature": 7.0}
    model = build_model(tiny_recipe("moe-cosine", {"model": {"channel": {"router": router}}}))
    assert all((r.temperature == expected).all() for r in model.routers())


def test_a_generator_is_a_function_of_its_whole_path() -> None:
    def first(*path: Any) -> float:
        return float(torch.rand((), generator=generator(*path)))

    paths = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", "up", 1)]
    assert len({first(*path) for path in paths}) == len(paths)
    assert first(0, "a", 1) == first(0, "a", 1)
