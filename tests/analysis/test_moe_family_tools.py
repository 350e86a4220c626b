"""Every tool that looks at routing, on couplings, experts that are blocks, and layers of which one has a
ghost awake and another has none: layer 0 has the experts 0 to 4, layer 1 the experts 0 to 3."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from saved_runs import Call, MakeRun, random_model, save_run
from sra_ds.analysis.explain import explain
from sra_ds.config import Recipe
from sra_ds.config.steering import AnyEdit, Boost, Replace, Scale, Steering, Towards
from sra_ds.inference.generate import Sampling, generate_batch
from sra_ds.inference.load import LoadedRun, load_run
from sra_ds.inference.steer import load_card, steered
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.moe.routers import anchor_rows
from sra_ds.steering.attribution import gate_slopes
from sra_ds.steering.effect import WordSets, prompt_batches, read_words
from sra_ds.storage.run_dir import RunDir

IDS = torch.arange(64).view(4, 16)
TEXT = "abc def gab hij"
GHOST, SLOTS = 4, [5, 4]
PLACES = [(layer, expert) for layer, slots in enumerate(SLOTS) for expert in range(slots)]
OPENED = ["moe-gnn", "moe-hgnn", "moe-block", "moe-ghost"]
QUICK = ("--tokens", 1500, "--json")
UNMEASURED = ("--measure-tokens", 0)


@pytest.fixture
def make(tiny_recipe: Callable[..., Recipe], corpus: Any, tmp_path: Path) -> Callable[..., RunDir]:
    """`make(family, alpha, channel, name)`: a run; the ghost of layer 0, if there is one, is awake."""

    def save(
        family: str = "moe-ghost",
        alpha: float = 1.0,
        channel: dict[str, Any] | None = None,
        name: str = "run",
    ) -> RunDir:
        data = corpus[0].model_dump(mode="json")
        overlay = {"data": data, "model": {"channel": channel or {}}}
        recipe = tiny_recipe(family, overlay)
        model = random_model(recipe)
        for part, parameter in model.named_parameters():
            if part.endswith("bias"):  # tokens differ, and so do their experts
                torch.nn.init.zeros_(parameter)
            elif part.endswith("temperature"):
                torch.nn.init.constant_(parameter, 3.0)
        if recipe.model.channel.ghosts.count:
            model.routers()[0].ghost_alpha_G[0] = alpha
        return save_run(tmp_path / name, recipe, corpus[1], model)

    return save


@pytest.fixture
def texts(tmp_path: Path) -> list[Any]:
    """Options that name two sets of texts."""
    for name, lines in (("with", "abc def\ngab hij\n"), ("without", "jih bag\nfed cba\n")):
        (tmp_path / name).write_text(lines)
    return ["--with", tmp_path / "with", "--without", tmp_path / "without"]


@torch.no_grad()
def outputs(model: LanguageModel, *edits: AnyEdit) -> Any:
    """Of the fixed ids under edits."""
    with steered(model, Steering(edits=edits)):
        return model(IDS, keep_scores=True)


def analysis_of(run: RunDir) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / "analysis.json").read_text())
    return found


def places_of(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(row["layer"], row["expert"]) for row in rows]


def test_the_analysis_has_the_experts_that_each_layer_has(
    call: Call, make: Callable[..., RunDir]
) -> None:
    """An expert that a layer lacks is not there: neither dead nor idle, nor anybody's partner."""
    run = make()
    made = call("analyze", "--run", run.path, "--sweep-tokens", 100, *QUICK).tree
    whole = analysis_of(run)
    experts, health = whole["experts"], whole["health"]
    assert places_of(experts) == PLACES
    assert sum(made["summary"][0]["kinds"].values()) == len(PLACES)
    for name in ("dead_by_routes", "dead_by_tokens"):
        counts = [sum(e[name] for e in experts if e["layer"] == layer) for layer in (0, 1)]
        assert [one[name] for one in health["per_layer"]] == counts and health[name] == sum(counts)
    for layer, slots in enumerate(SLOTS):
        own = [expert for expert in experts if expert["layer"] == layer]
        assert sum(expert["load"] for expert in own) == pytest.approx(1)
        assert all(expert["partner"] in (None, *range(slots)) for expert in own)
        assert all(len(expert["nearest_tokens"]) == 10 for expert in own)
        assert whole["layers"][layer]["anchors"]["effective_rank"]["value"] <= slots + 1e-6
    assert min(expert["load"] for expert in experts) > 0.01  # nobody is dead, and a ghost is there
    assert health["dead_by_routes"] == 0
    assert [row["k"] for row in whole["sweeps"]["k"]] == [1, 2, 3, 4]
    for row in whole["sweeps"]["dropped"]:
        assert row["share"] == row["dropped"] * 2 / len(PLACES)
    assert "2 of 4 to 5 experts per token" in (run.path / "report.html").read_text()
    assert {Path(path).stem for path in made["figures"]} >= {"load", "co_activation", "anchor_map"}
    with (run.path / "experts.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [(int(row["layer"]), int(row["expert"])) for row in table] == PLACES


def test_sleeping_ghosts_change_no_number(
    call: Call, make: Callable[..., RunDir], corpus: Any, texts: list[Any], tmp_path: Path
) -> None:
    """Of what a run of the same weights without ghosts gives."""
    run = make(alpha=0.0)
    tree = run.recipe().model_dump(mode="json")
    tree["model"]["channel"]["ghosts"] = {}
    plain = Recipe.model_validate(tree)
    model, state = build_model(plain), load_run(run.path).model.state_dict()
    with torch.no_grad():
        for (
            name,
            value,
        ) in model.state_dict().items():  # couplings have rows for ghosts behind others
            value.copy_(state[name][tuple(slice(length) for length in value.shape)])
    other = save_run(tmp_path / "plain" / "run", plain, corpus[1], model)
    asked: list[tuple[Any, ...]] = [
        ("analyze", "--sweep-tokens", 0, *QUICK),
        ("explain_routing", "--text", TEXT, "--json"),
        ("steer", "detect", *texts, "--json"),
        ("steer", "attribute", "--words", "/a/", "--tokens", 100, "--json"),
    ]
    for tool, *options in asked:
        first, second = (call(tool, "--run", one.path, *options).tree for one in (run, other))
        if tool != "analyze":  # which prints where it wrote
            first.pop("run", None), second.pop("run", None)
            assert first == second, tool
    assert analysis_of(run) == analysis_of(other)
    assert (run.path / "experts.csv").read_text() == (other.path / "experts.csv").read_text()


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_an_explanation_names_the_ghost_and_its_cosine(
    make: Callable[..., RunDir], alpha: float
) -> None:
    """The angle to its anchor, also while it wakes and its score is ln(alpha) lower."""
    loaded = load_run(make(alpha=alpha).path)
    router, kept = loaded.model.routers()[0], []
    handle = router.register_forward_hook(lambda m, given, out: kept.append(given[0]))
    found = explain(loaded, TEXT, near=9)
    handle.remove()
    anchors_ED = anchor_rows(router)
    assert anchors_ED is not None
    cosine_TE = cosine_similarity(kept[0][:, None], anchors_ED.detach()[None], dim=-1)
    temperature = float(router.temperature.detach())
    for token, layers in enumerate(found.decisions):
        for decision, slots in zip(layers, SLOTS, strict=True):
            every = [choice.expert for choice in (*decision.chosen, *decision.near)]
            assert sorted(every) == list(range(slots))
        for choice in (*layers[0].chosen, *layers[0].near):
            cosine = float(cosine_TE[token, choice.expert])
            assert choice.cosine == pytest.approx(cosine, abs=1e-5)
            lower = np.log(alpha) if choice.expert == GHOST else 0.0
            assert choice.score == pytest.approx(temperature * cosine + lower, abs=1e-4)


def test_a_suppressed_ghost_has_no_load_and_the_rest_stays(
    call: Call, make: Callable[..., RunDir], tmp_path: Path
) -> None:
    run, card = make(), tmp_path / "card.json"
    asked = ("steer", "--run", run.path, "suppress")
    call(*asked, "0:4", "--out", card, "--measure-tokens", 300, "--json").tree["cost"]
    model = load_run(run.path).model
    before, after = outputs(model), outputs(model, *load_card(card).edits)
    was, now = before.routings[0], after.routings[0]
    served = (was.expert_ids_TK == GHOST).any(-1)
    assert 0 < served.sum() < len(served)
    assert now.load_E[GHOST] == 0 and now.load_E.sum() == was.load_E.sum()
    assert torch.equal(now.expert_ids_TK[~served], was.expert_ids_TK[~served])
    assert torch.equal(now.gates_TK[~served], was.gates_TK[~served])
    assert len(after.routings[1].load_E) == SLOTS[1]
    asleep = load_run(run.path).model
    asleep.routers()[0].ghost_alpha_G.zero_()
    never = outputs(asleep).routings[0]  # what a coupling makes of it may differ
    assert torch.equal(now.expert_ids_TK, never.expert_ids_TK)
    torch.testing.assert_close(now.gates_TK, never.gates_TK, atol=1e-5, rtol=1e-5)
    call(*asked, "1:4", "--out", card, *UNMEASURED).refused("1:4", "the layer has 4 experts")


@pytest.mark.parametrize("family", OPENED)
def test_edits_that_change_nothing_change_no_bit(make: Callable[..., RunDir], family: str) -> None:
    model = load_run(make(family).path).model
    last = model.routers()[0].slots - 1
    before = outputs(model).logits
    for edit in (
        Scale(layer=0, expert=last, by=1.0),
        Boost(layer=0, expert=last, by=0.0),
        Towards(layer=0, expert=last, strength=0.0),
        Replace(layer=0, expert=last, output=last),
    ):
        assert torch.equal(outputs(model, edit).logits, before), edit.kind
    moved = outputs(model, Towards(layer=0, expert=last, strength=1.0)).logits
    assert not torch.equal(moved, before) and torch.equal(outputs(model).logits, before)
    parts = {name for module in model.modules() for name in vars(module)}
    assert not parts & {"forward", "routes"}


@torch.no_grad()
def with_other_weights(model: LanguageModel, edit: Replace) -> None:
    """What the edit says, done to the weights: the expert becomes another one, or says the same to
    everything."""
    layer = model.routed_layers()[edit.layer]
    own = layer.backend.experts
    parts: Any = own.state_dict(keep_vars=True)
    if isinstance(edit.output, int):
        source = parts
        at = edit.output
        if at == GHOST:
            source, at = layer.ghosts[0].state_dict(), 0
        for name, tensor in parts.items():
            tensor[edit.expert] = source[name][at]
        return
    for name, tensor in parts.items():
        if name.split(".")[-1] in ("out_weight", "out_bias", "down_weight", "down_bias"):
            tensor[edit.expert] = 0.0
            if isinstance(edit.output, tuple) and name.endswith("down_bias"):
                tensor[edit.expert] = torch.tensor(edit.output)


VECTOR = tuple(np.linspace(-3, 3, 32).tolist())


@pytest.mark.parametrize("output", [0, GHOST, "zero", VECTOR], ids=["0", "ghost", "zero", "vector"])
@pytest.mark.parametrize("family", OPENED)
def test_to_replace_an_output_is_to_change_the_weights(
    make: Callable[..., RunDir], family: str, output: Any
) -> None:
    """Also for the experts that hear it."""
    if output == GHOST and family != "moe-ghost":
        output = 3
    path = make(family).path
    edit = Replace(layer=0, expert=2, output=output)
    model, other = load_run(path).model, load_run(path).model
    before = outputs(model).logits
    with_other_weights(other, edit)
    after = outputs(model, edit).logits
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, outputs(other).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", OPENED)
def test_towards_moves_what_router_and_experts_are_given(
    make: Callable[..., RunDir], family: str
) -> None:
    """Experts that are blocks get it outside of the layer; cached keys are of moved vectors, too."""
    loaded = load_run(make(family).path)
    model, layer = loaded.model, loaded.model.routed_layers()[0]
    expert = layer.router.slots - 1
    edits = (Towards(layer=0, expert=expert, strength=0.7),)
    after = outputs(model, *edits).logits
    unit_D = normalize(anchor_rows(layer.router)[expert], dim=0)

    def move(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BTD, *rest = arguments
        return (x_BTD + 0.7 * x_BTD.norm(dim=-1, keepdim=True) * unit_D, *rest)

    before = outputs(model).logits
    handle: Any = model.blocks[0].channel.register_forward_pre_hook(move)
    torch.testing.assert_close(after, outputs(model).logits, atol=1e-4, rtol=1e-4)
    assert (after - before).abs().max() > 0.01
    moved = greedy(loaded)
    handle.remove()
    with steered(model, Steering(edits=edits)):
        assert greedy(loaded) == moved


def greedy(loaded: LoadedRun) -> list[str]:
    """Continuations with cached keys and values, of prompts padded to one length."""
    found = generate_batch(
        loaded.model, loaded.tokenizer, ["abc", "gab hij fed"], 8, Sampling(temperature=0)
    )
    return [one.text for one in found]


def test_detect_and_attribute_name_every_expert_once(
    call: Call, make: Callable[..., RunDir], texts: list[Any]
) -> None:
    """Values and p are those of the experts there are: adjusting counts none that a layer lacks."""
    run = make()
    asked = ("steer", "--run", run.path)
    found = call(*asked, "detect", *texts, "--json").tree["experts"]
    words = ("attribute", "--words", "/a/", "--against", "/b/", "--tokens", 200)
    slopes = call(*asked, *words, "--json").tree["experts"]
    for rows in (found, slopes):
        assert sorted(places_of(rows)) == PLACES
        p_P, adjusted_P = (np.array([row[name] for row in rows]) for name in ("p", "p_adjusted"))
        assert adjusted_P.max() == pytest.approx(p_P.max()) and (adjusted_P >= p_P).all()
        smallest = adjusted_P[p_P.argmin()]
        assert smallest == pytest.approx(
            min(p * len(PLACES) / (p_P <= p).sum() for p in p_P)  # Benjamini and Hochberg
        )
    assert all(row["slope"] is not None and row["cost"] > 0 for row in slopes)


@pytest.mark.parametrize("family", ["moe-ghost", "moe-gnn", "moe-block"])
def test_slopes_are_finite_differences(make: Callable[..., RunDir], family: str) -> None:
    """Of real scalings of the gates, ghosts too; NaN where a layer lacks the expert."""
    loaded = load_run(make(family).path)
    model, words = loaded.model.double(), WordSets([10, 20, 30], [11, 21])
    step = 2.0**-16  # 1 + step is a float32, as factors are
    batches = prompt_batches(loaded, ["one", "two words"])
    slopes_BLE = gate_slopes(model, batches, words)
    for layer, router in enumerate(model.routers()):
        assert np.isnan(slopes_BLE[:, layer, router.slots :]).all()
        expert, odds = router.slots - 1, []
        for by in (1 + step, 1 - step):
            edit = Scale(layer=layer, expert=expert, by=by)
            with steered(model, Steering(edits=(edit,))):
                odds.append(read_words(model, batches, words)["log_odds"])
        expected_B = (odds[0] - odds[1]) / (2 * step)
        np.testing.assert_allclose(slopes_BLE[:, layer, expert], expected_B, atol=1e-5)


def test_a_ghost_is_verified_and_has_an_effect(
    call: Call, make: Callable[..., RunDir], tmp_path: Path
) -> None:
    run, card = make(), tmp_path / "card.json"
    asked = ("steer", "--run", run.path)
    (row,) = call(*asked, "verify", "0:4", "--tokens", 100, "--json").tree["verified"]
    assert (row["layer"], row["expert"]) == (0, GHOST) and row["tokens"]
    assert row["responses"]["scale 1"]["kl"] == pytest.approx(0, abs=1e-6)
    assert row["responses"]["suppress"]["kl"] > 1e-4
    towards = ("towards", "0:4", "--strength", 0.5, "--direction", "centroid")
    assert call(*asked, *towards, "--out", card, *UNMEASURED).code == 0
    told = call(*asked, "effect", card, "--words", "/a/", "--tokens", 100, "--json").tree
    assert told["effect"]["share"]["change"]["p"] > 0 and told["cost"]["divergence"] > 1e-4
    call(*asked, "verify", "1:4").refused("verify 1:4: there is no expert 4 (0 to 3)")
    centroid = (*towards[2:], "--out", card)
    call(*asked, "towards", "1:4", *centroid).refused("there is no expert 4 (0 to 3)")
    call(*asked, "towards", "9:0", *centroid).refused("there is no layer 9 (0 to 1)")


def test_of_blocks_that_all_run_none_can_be_suppressed(
    call: Call, make: Callable[..., RunDir], tmp_path: Path
) -> None:
    """A card is refused; verification leaves that dose out."""
    run = make("moe-block")
    asked = ("steer", "--run", run.path)
    suppress = ("suppress", "0:3", "--out", tmp_path / "card.json", *UNMEASURED)
    call(*asked, *suppress).refused("leaves 3 experts of layer 0; the router chooses 4")
    (row,) = call(*asked, "verify", "0:3", "--tokens", 100, "--json").tree["verified"]
    assert "suppress" not in row["responses"] and row["responses"]["scale 0"]["kl"] > 1e-4


@pytest.mark.parametrize("family", OPENED)
def test_runs_are_scored_and_continued_under_a_card(
    call: Call, make: Callable[..., RunDir], family: str, tmp_path: Path
) -> None:
    run, card = make(family), tmp_path / "card.json"
    slots_L = [router.slots for router in load_run(run.path).model.routers()]
    place = f"0:{slots_L[0] - 1}"
    made = ("steer", "--run", run.path, "scale", place, "--by", 0, "--out", card, "--json")
    assert "cost" not in call(*made, *UNMEASURED).tree
    scored = ("evaluate", "--run", run.path, "--health-tokens", 1, "--json")
    plain, changed = call(*scored).tree, call(*scored, "--steer", card).tree
    assert plain["nll_per_token"] != changed["nll_per_token"]
    for layer, slots in zip(plain["experts"]["per_layer"], slots_L, strict=True):
        assert 1 / slots - 1e-9 <= layer["max_share"] and layer["effective_experts"] <= 1 + 1e-9
        assert layer["max_violation"] == pytest.approx(layer["max_share"] * slots - 1)
    options = ("--prompt", "abc", "--max-tokens", 3, "--steer", card, "--json")
    assert call("generate", "--run", run.path, *options).tree["text"]
    told = call("explain_routing", "--run", run.path, "--text", TEXT, "--steer", card, "--json")
    assert [len(layer["chosen"]) for layer in told.tree["tokens"][0]["layers"]]


def test_experts_leave_and_come_back_and_ghosts_stay(
    call: Call, make: Callable[..., RunDir], tmp_path: Path
) -> None:
    """Cards name the loads of an analysis that counts ghosts."""
    run, out = make(), tmp_path / "experts"
    call("analyze", "--run", run.path, "--sweep-tokens", 0, *QUICK)
    made = call("export_experts", "--run", run.path, "--out", out, "--json")
    assert made.tree["experts"] == 8 and "ghosts are not exported: 1 awake" in made.err
    for expert in analysis_of(run)["experts"]:
        card = out / f"layer{expert['layer']}-expert{expert['expert']:02d}.json"
        assert card.is_file() == (expert["expert"] != GHOST)
        if card.is_file():
            load = json.loads(card.read_text())["load"]["share"]
            assert load == pytest.approx(expert["load"], abs=1e-6)
    asked = ("export_experts", "--run", run.path, "--out", tmp_path / "merged")
    assert call(*asked, "--merge", out, "--measure-tokens", 0).code == 0
    before, after = (load_run(path).model for path in (run.path, tmp_path / "merged"))
    assert torch.equal(outputs(before).logits, outputs(after).logits)
    call(*asked[:-1], tmp_path / "no", "--experts", 4).refused("there is no expert 4 (0 to 3)")


def test_a_block_goes_only_where_heads_are_the_same(
    call: Call, make: Callable[..., RunDir], tmp_path: Path
) -> None:
    """Its tensors have the same shapes with any number of heads."""
    run, other = make("moe-block"), make("moe-block", channel={"expert_heads": 4}, name="other")
    out = tmp_path / "experts"
    assert call("export_experts", "--run", run.path, "--out", out).code == 0
    for into, fits in ((run, True), (other, False)):
        asked = ("export_experts", "--run", into.path, "--merge", out, *UNMEASURED)
        made = call(*asked, "--out", tmp_path / f"merged-{into.path.name}")
        assert (made.code == 0) == fits
        if not fits:
            made.refused("heads=2", "has heads=4")


REFUSED = {
    "coupling": ({"coupling": {"kind": "gnn", "rank": 4}}, "coupling=gnn", "coupling"),
    "ghosts": ({"ghosts": {"count": 1}}, "ghosts.count=1", "ghosts.count"),
    "block": ({"expert_kind": "block", "top_k": 4}, "leaves 3 experts", "expert_kind"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_pruning_and_transformers_do_not_know_is_refused(
    call: Call, make_run: MakeRun, case: str, tmp_path: Path
) -> None:
    channel, reason, key = REFUSED[case]
    run = make_run("moe-cosine", {"model": {"channel": channel}}, case)
    out = tmp_path / "out"
    asked = ("export_experts", "--run", run.path, "--out", out, "--prune", "0:1,1:2")
    call(*asked, "--measure-tokens", 0).refused(reason)
    call("export_hf", "--run", run.path, "--out", out).refused(
        f"model.channel.{key}", "cannot be exported to transformers"
    )
    assert not out.exists()


@pytest.mark.parametrize("family", OPENED)
def test_runs_are_consolidated_counted_and_planned(
    call: Call, make: Callable[..., RunDir], family: str, tmp_path: Path
) -> None:
    run, out = make(family), tmp_path / "whole"
    assert call("convert_checkpoint", "--run", run.path, "--consolidate", "--out", out).code == 0
    before, after = load_run(run.path).model, load_run(out).model
    assert [router.slots for router in after.routers()] == [r.slots for r in before.routers()]
    assert torch.equal(outputs(before).logits, outputs(after).logits)
    counted = call("count_active_params", "--run", out, "--json").tree
    sizes = {name: parameter.numel() for name, parameter in before.named_parameters()}
    assert counted["total"] == sum(sizes.values())
    experts = sum(n for name, n in sizes.items() if ".backend." in name)
    ghosts = sum(n for name, n in sizes.items() if ".moe.ghosts." in name)
    top_k = before.routers()[0].top_k
    idle = experts * (4 - top_k) // 4 + ghosts
    assert counted["active_with_anchors"] == counted["total"] - idle
    planned = call("plan", "--recipe", run.recipe_file, "--json").tree
    assert planned["parameters"]["total"] == counted["total"]
