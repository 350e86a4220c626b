"""Specialisation: what the score says, what is measured, and how weights follow it."""

import copy
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from commands import interrupt, train
from references import randomise, unstack
from sra_ds.config import Recipe
from sra_ds.data.loader import Batch, random_batch
from sra_ds.errors import ConfigError
from sra_ds.metrics import specialisation
from sra_ds.model.language_model import build_model
from sra_ds.training.anchors import router_inputs
from sra_ds.training.controllers import specialisation as module
from sra_ds.training.controllers.protocol import Seen
from sra_ds.training.controllers.specialisation import Measurement, Specialisation, all_outputs
from sra_ds.training.step import step_loss

Builder = Callable[..., Recipe]
LAYERS = 2
KINDS = ["moe-hgnn", "moe-block"]
"""Experts that are networks, and experts that are blocks."""


class PlainEngine(nn.Module):
    """A model behind the names of an engine."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.module = recipe, build_model(recipe)
        randomise(self.module, 0.2)

    def forward(self, *batch: Any) -> Any:
        return self.module(*batch)

    def batch(self, number: int) -> Batch:
        return random_batch(self.recipe, self.recipe.training.batch_size, number)


class Scripted(Specialisation):
    """Measures what it is told."""

    told: Sequence[list[float]]

    def measure(self, step: int) -> list[float]:
        return self.told[step]


@pytest.fixture
def engine_with(tiny_recipe: Builder) -> Callable[..., PlainEngine]:
    """`engine_with(family, model, **watched)`: two layers and how they are watched."""

    def build(
        family: str = "moe-hgnn", model: dict[str, Any] | None = None, **watched: Any
    ) -> PlainEngine:
        training = {"specialisation": {"every": 1, "tokens": 32, **watched}, "steps": 100}
        return PlainEngine(tiny_recipe(family, {"model": model or {}, "training": training}))

    return build


@pytest.fixture
def watch_with(engine_with) -> Callable[..., Scripted]:
    """`watch_with(scores, ...)`: a controller that measures these scores of both layers."""

    def build(scores: Sequence[list[float]], **watched: Any) -> Scripted:
        engine = engine_with(**{"target": 0.5, "layer_decay": 1.0, **watched})
        watch = Scripted(engine.recipe, engine, engine.batch)
        watch.told = scores
        return watch

    return build


def measured(watch: Specialisation, step: int) -> Measurement:
    (found,) = watch.on_step_end(step, Seen())
    assert isinstance(found, Measurement)
    return found


def outputs(experts: int = 4, tokens: int = 4096, width: int = 8) -> Tensor:
    return torch.randn(experts, tokens, width)


def test_copies_that_are_turned_scaled_and_moved_have_not_specialised() -> None:
    first_ND = outputs(1)[0]
    turns = [torch.linalg.qr(torch.randn(8, 8))[0] for _ in range(3)]
    same = [first_ND, *[4.0**n * first_ND @ turn + n for n, turn in enumerate(turns)]]
    assert specialisation(torch.stack([first_ND] * 4)) == pytest.approx(0.0, abs=1e-9)
    assert specialisation(torch.stack(same)) == pytest.approx(0.0, abs=1e-6)


def test_outputs_that_have_nothing_in_common_score_one() -> None:
    apart = outputs()
    assert 0.99 < specialisation(apart) <= 1
    assert specialisation(torch.stack([apart[0], apart[0], apart[1], apart[1]])) == pytest.approx(
        4 / 6, abs=0.01
    )


def test_the_score_does_not_depend_on_the_size_of_outputs() -> None:
    mixed = outputs(4, 50) + outputs(1, 50)
    sizes = torch.tensor([1e-6, 1.0, 3.0, 1e6], dtype=torch.float64).view(4, 1, 1)
    assert specialisation(mixed * sizes) == pytest.approx(specialisation(mixed), rel=1e-9)


def test_the_score_is_one_minus_cka_pair_by_pair() -> None:
    """By Gram matrices of tokens, as in the paper."""
    mixed, tokens = outputs(3, 20).double() + outputs(1, 20).double(), 20
    centre = torch.eye(tokens, dtype=torch.float64) - 1 / tokens
    grams = [centre @ x_ND @ x_ND.T @ centre for x_ND in mixed]

    def shared(i: int, j: int) -> float:
        return float((grams[i] * grams[j]).sum())

    pairs = [(0, 1), (0, 2), (1, 2)]
    cka = [shared(i, j) / math.sqrt(shared(i, i) * shared(j, j)) for i, j in pairs]
    assert 0.1 < sum(cka) / 3 < 0.9
    assert specialisation(mixed) == pytest.approx(1 - sum(cka) / 3, rel=1e-9)


def test_weights_rise_below_the_target_fall_above_and_rest_near_it(watch_with) -> None:
    watch = watch_with([[0.3, 0.58], [0.515, 0.485], [0.525, 0.475]], rate=0.5, dead_band=0.02)
    up, down = 0.1 * math.exp(0.5 * 0.2), 0.1 * math.exp(-0.5 * 0.08)
    assert measured(watch, 0).weights == pytest.approx([up, down])
    assert measured(watch, 1).weights == pytest.approx([up, down])
    little = math.exp(0.5 * 0.025)
    assert measured(watch, 2) == Measurement(
        [0.525, 0.475], pytest.approx([up / little, down * little]), []
    )


@pytest.mark.parametrize(("score", "bound"), [(0.0, 0.25), (1.0, 0.02)])
def test_weights_stay_within_their_bounds(watch_with, score: float, bound: float) -> None:
    watch = watch_with([[score, 0.5]] * 12, lowest=0.02, highest=0.25)
    found = [measured(watch, step).weights for step in range(12)]
    assert found[0][0] not in (0.1, bound) and found[-1] == [bound, 0.1]
    assert all(0.02 <= weight <= 0.25 for weights in found for weight in weights)


def test_a_collapse_doubles_a_weight_once_and_only_its_own(watch_with) -> None:
    falling = [0.95, 0.8, 0.65, 0.5, 0.5, 0.3]
    watch = watch_with([[score, 0.5] for score in falling], rate=0.1, highest=1.0)
    found = [measured(watch, step) for step in range(6)]
    assert [each.collapsed for each in found] == [[], [0], [], [], [], [0]]
    weights = [each.weights[0] for each in found]
    steps = [after / before for before, after in zip([0.1, *weights], weights, strict=False)]
    usual = [math.exp(0.1 * (0.5 - score)) for score in falling]
    assert steps == pytest.approx([usual[0], 2, usual[2], 1, 1, 2])
    assert {each.weights[1] for each in found} == {0.1}
    assert "layer 0 COLLAPSED" in found[1].line() and "COLLAPSED" not in found[2].line()


def test_a_collapse_does_not_pass_the_upper_bound(watch_with) -> None:
    watch = watch_with([[0.9, 0.9], [0.7, 0.9]], highest=0.15, rate=0.01)
    assert [measured(watch, step).weights[0] for step in range(2)][1] == 0.15


def test_weights_start_smaller_layer_by_layer(engine_with) -> None:
    engine = engine_with(target=0.99)
    watch = Specialisation(engine.recipe, engine, engine.batch)
    assert watch.weights == pytest.approx([0.1, 0.08])
    assert [layer.overlap_weight for layer in watch.layers] == pytest.approx([1.0, 0.8])
    bounded = engine_with(target=0.99, lowest=0.09, highest=0.095)
    assert Specialisation(bounded.recipe, bounded, bounded.batch).weights == [0.095, 0.09]


@torch.no_grad()
def test_a_weight_is_that_of_its_layer_in_the_loss(watch_with) -> None:
    watch = watch_with([[0.0, 1.0]], rate=1.0)
    engine = watch.engine
    output = engine(*engine.batch(0))
    before = step_loss(output, engine.recipe.losses)
    overlaps = [output.facts[f"layer{n}/overlap"] for n in range(LAYERS)]
    weights = measured(watch, 0).weights
    after = step_loss(engine(*engine.batch(0)), engine.recipe.losses)
    assert float(after.cross_entropy) == float(before.cross_entropy)
    expected = [weight * float(overlap) for weight, overlap in zip(weights, overlaps, strict=True)]
    mean = sum(expected) / LAYERS
    assert float(after.total - after.cross_entropy) == pytest.approx(mean, abs=2e-6)
    assert abs(float(after.total - before.total)) > 1e-4


def test_without_a_target_it_only_measures(watch_with) -> None:
    watch = watch_with([[0.9, 0.1], [0.1, 0.9]], target=None)
    found = [measured(watch, step) for step in range(2)]
    assert [each.scores for each in found] == [[0.9, 0.1], [0.1, 0.9]]
    assert all(each.weights is None and each.collapsed == [] for each in found)
    assert [layer.overlap_weight for layer in watch.layers] == [1.0, 1.0]
    watch.told = []
    watch.require_reachable()


def test_it_goes_on_from_a_checkpoint(watch_with) -> None:
    scores = [[0.9, 0.4], [0.7, 0.45], [0.55, 0.6], [0.4, 0.7], [0.41, 0.3]]
    watch, resumed = watch_with(scores), watch_with(scores)
    found = [measured(watch, step) for step in range(2)]
    assert found[1].collapsed == [0]
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert watch.state_dict() == resumed.state_dict()
    assert shares(watch) == shares(resumed) != [1.0, 1.0]
    for step in range(2, 5):
        assert measured(resumed, step) == measured(watch, step)
        assert shares(watch) == shares(resumed)


def shares(watch: Specialisation) -> list[float]:
    return [layer.overlap_weight for layer in watch.layers]


@pytest.mark.parametrize("scores", [[0.2, 0.5], [0.5, 0.2], [0.8, 0.1]])
def test_a_target_that_untrained_experts_have_is_refused(watch_with, scores: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"specialisation.target=0.5 is no more .*raise it"):
        watch_with([scores]).require_reachable()
    watch_with([[0.49, 0.2]]).require_reachable()


def test_a_run_with_such_a_target_does_not_start(tiny: Path, tmp_path: Path) -> None:
    overrides = (*WATCHED, "training.specialisation.target=0.01")
    result = train("--recipe", tiny / "tiny.yaml", "--run", tmp_path / "run", *overrides)
    assert result.returncode == 2 and "untrained experts have" in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_every_expert_answers_every_token(engine_with) -> None:
    engine = engine_with()
    batch = engine.batch(0)
    found = all_outputs(engine, engine.module.routed_layers(), batch, 32)
    inputs = router_inputs(engine.module.routers(), engine, batch)
    for layer, outputs_END, x_ND in zip(engine.module.routed_layers(), found, inputs, strict=True):
        assert len(x_ND) == 64
        networks = unstack(layer.backend.experts, layer.config.expert, 32)
        expected = torch.stack([network(x_ND[:32]) for network in networks])
        torch.testing.assert_close(outputs_END, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_blocks_are_compared_by_what_they_add(engine_with) -> None:
    """With the gates all to one expert, what the layer adds is what that expert said."""
    engine = engine_with("moe-block", {"channel": {"coupling": "none"}})
    batch, layers = engine.batch(0), engine.module.routed_layers()
    before = next(iter(all_outputs(engine, layers[:1], batch, 32)))
    assert before.shape == (4, 32, 32)
    added: list[Tensor] = []
    layers[0].register_forward_hook(lambda layer, given, found: added.append(found[0]))
    for expert in range(4):
        handle = layers[0].router.register_forward_hook(functools.partial(all_to, expert))
        engine(*batch)
        handle.remove()
        torch.testing.assert_close(before[expert], added[-1][:32], rtol=1e-5, atol=1e-5)


def all_to(expert: int, router: nn.Module, given: Any, routing: Any) -> Any:
    del router, given
    return routing._replace(gates_TK=(routing.expert_ids_TK == expert).float())


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_experts_score_by_how_differently_they_answer(engine_with, family: str) -> None:
    engine = engine_with(family)
    watch = Specialisation(engine.recipe, engine, engine.batch)
    assert min(watch.measure(0)) > 0.05
    experts = watch.layers[1].backend.experts
    for parameter in experts.parameters():
        parameter.copy_(parameter[:1].clone())
    scores = watch.measure(0)
    assert scores[0] > 0.05 and scores[1] == pytest.approx(0.0, abs=1e-6)
    for parameter in experts.parameters():
        parameter[3].normal_(0, 0.2)
    apart = watch.measure(0)
    assert apart[0] == scores[0] and apart[1] > 0.01


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_everything_as_it_was(engine_with, family: str, training: bool) -> None:
    lossy = {
        "embedding": {"dropout": 0.2},
        "mixer": {"dropout": 0.2},
        "channel": {"expert": {"dropout": 0.2}, "router": {"noise": 1.0}},
    }
    engine, calm = engine_with(family, lossy), engine_with(family)
    calm.load_state_dict(engine.state_dict())
    engine.train(training)
    watch = Specialisation(engine.recipe, engine, lambda step: engine.batch(3))
    before, random = copy.deepcopy(engine.state_dict()), torch.get_rng_state()
    hooks = count_hooks(engine)
    scores = watch.measure(0)
    assert watch.measure(0) == watch.measure(7) == scores  # dropout and noise are off
    assert Specialisation(calm.recipe, calm, lambda step: calm.batch(3)).measure(0) == scores
    assert torch.equal(torch.get_rng_state(), random)
    assert {part.training for part in engine.modules()} == {training}
    assert all(torch.equal(engine.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in engine.parameters())
    assert count_hooks(engine) == hooks


def count_hooks(engine: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.modules())


def test_tokens_come_from_the_batch_of_the_step(engine_with) -> None:
    engine = engine_with()
    asked: list[int] = []
    watch = Specialisation(
        engine.recipe, engine, lambda step: asked.append(step) or engine.batch(step)
    )
    assert watch.measure(3) != watch.measure(5) and asked == [3, 5]


@pytest.mark.parametrize("family", KINDS)
def test_padding_is_no_token(engine_with, family: str) -> None:
    engine = engine_with(family)
    layers, batch = engine.module.routed_layers(), engine.batch(0)
    valid_BT = torch.arange(16) < torch.tensor([[3], [16], [1], [12]])
    padded = batch._replace(valid_BT=valid_BT)
    changed = padded._replace(ids_BT=batch.ids_BT.where(valid_BT, 7))
    for tokens, expected in ((1000, 32), (20, 20)):
        found, other = (all_outputs(engine, layers, b, tokens) for b in (padded, changed))
        for mine, theirs in zip(found, other, strict=True):
            assert mine.shape == (4, expected, 32)
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_of_many_experts_the_same_sixteen_are_compared(engine_with, monkeypatch) -> None:
    engine = engine_with("moe-cosine", {"channel": {"experts": 20}})
    compared: list[Tensor] = []

    def note(outputs_END: Tensor) -> float:
        compared.append(outputs_END)
        return specialisation(outputs_END)

    monkeypatch.setattr(module, "specialisation", note)
    watch = Specialisation(engine.recipe, engine, lambda step: engine.batch(0))
    assert watch.measure(0) == watch.measure(9)
    every = list(all_outputs(engine, watch.layers, engine.batch(0), 32))
    chosen = []
    for layer, outputs_END in enumerate(compared[:LAYERS]):
        places = torch.cdist(outputs_END.flatten(1), every[layer].flatten(1)).argmin(1).tolist()
        assert len(set(places)) == len(outputs_END) == 16
        chosen.append(sorted(places))
    assert chosen[0] != chosen[1]


WATCHED = (
    "model.channel.compare_outputs=true",
    "model.channel.expert.dropout=0.1",
    "training.specialisation={every: 5, tokens: 64, target: 0.999}",
)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("specialisation") / "run"
    result = train("--recipe", tiny / "tiny.yaml", "--run", run, *WATCHED, stage=2)
    assert result.returncode == 0, result.stderr
    assert "specialisation (1 - CKA) by layer: 0." in result.stderr
    return run


def measurements(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    kept = ("step", "specialisation")
    return [{key: line[key] for key in kept} for line in lines if "specialisation" in line]


def test_measurements_and_the_last_step_are_lines_of_metrics(whole: Path) -> None:
    found = measurements(whole)
    assert [line["step"] for line in found] == [5, 10, 12]
    weights = [0.1, 0.08]
    for line in found:
        told = line["specialisation"]
        assert all(0 < score < 0.999 for score in told["scores"]) and told["collapsed"] == []
        weights = [
            min(0.3, weight * math.exp(0.5 * (0.999 - score)))
            for weight, score in zip(weights, told["scores"], strict=True)
        ]
        assert told["weights"] == pytest.approx(weights)


def test_a_resumed_run_measures_the_same(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "interrupted"
    interrupt(whole, run, at=8, end=12)
    result = train("--resume", "--run", run, stage=2)
    assert result.returncode == 0, result.stderr
    assert measurements(run) == measurements(whole)
    ours, theirs = (load_file(r / "checkpoints" / "12" / "model.safetensors") for r in (run, whole))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
