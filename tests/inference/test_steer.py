"""Steering: neutral edits are the identity, an edit touches only the tokens its expert serves."""

import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from references import randomise
from sra_ds.config import Recipe
from sra_ds.config.steering import Boost, Pin, Replace, Scale, Steering, Suppress, Towards
from sra_ds.errors import ConfigError
from sra_ds.inference.steer import load_card, save_card, steered, steered_by
from sra_ds.model.language_model import LanguageModel, build_model

IDS = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(3))
SCORED = ["moe-cosine", "moe-linear", "moe-swiglu-shared"]
Make = Callable[..., Recipe]


@pytest.fixture(params=SCORED)
def model(request: pytest.FixtureRequest, tiny_recipe: Make) -> LanguageModel:
    """A tiny model of each router with scores, with weights large enough to differ."""
    return varied(tiny_recipe(request.param))


@torch.no_grad()
def varied(recipe: Recipe) -> LanguageModel:
    """Random weights, and router inputs that differ from token to token."""
    model = randomise(build_model(recipe)).eval()
    for block in model.blocks:
        block.channel_norm.bias.zero_()
    return model


def steering(*edits) -> Steering:
    return Steering(edits=edits)


@torch.no_grad()
def run(model: LanguageModel, *edits):
    """(logits, routings) of the fixed ids under edits."""
    with steered(model, steering(*edits)):
        output = model(IDS, keep_scores=True)
    return output.logits, output.routings


def served(routing, expert: int) -> torch.Tensor:
    """Tokens that chose the expert."""
    return (routing.expert_ids_TK == expert).any(-1)


def partial_expert(routing) -> int:
    """An expert that serves some tokens and not others."""
    loads = [int(served(routing, expert).sum()) for expert in range(4)]
    expert = min(range(4), key=lambda e: abs(loads[e] - IDS.numel() / 2))
    assert 0 < loads[expert] < IDS.numel()
    return expert


NEUTRAL = [
    Scale(layer=0, expert=1, by=1.0),
    Scale(layer=1, expert=2, by=1.0, renormalise=True),
    Boost(layer=0, expert=0, by=0.0),
    Towards(layer=1, expert=3, strength=0.0),
    Replace(layer=0, expert=2, output=2),
]


@pytest.mark.parametrize("edit", NEUTRAL, ids=lambda e: e.kind)
def test_neutral_edits_change_no_bit(model, edit):
    before, _ = run(model)
    after, _ = run(model, edit)
    assert torch.equal(before, after)


def test_leaving_the_block_leaves_the_model_as_it_was(model):
    before, _ = run(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, Suppress(layer=0, expert=1), Towards(layer=1, expert=0, strength=1.0),
        Replace(layer=1, expert=3), Scale(layer=0, expert=0, by=2.0))  # fmt: skip
    assert torch.equal(run(model)[0], before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_error_inside_the_block_undoes_the_steering_too(model):
    with pytest.raises(RuntimeError), steered(model, steering(Suppress(layer=0, expert=1))):
        raise RuntimeError
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("layer", [0, 1])
def test_a_suppressed_expert_has_no_load_and_others_keep_their_tokens(model, layer):
    _, before = run(model)
    expert = partial_expert(before[layer])
    _, after = run(model, Suppress(layer=layer, expert=expert))
    was, now = before[layer], after[layer]
    assert now.load_E[expert] == 0 and not served(now, expert).any()
    assert now.load_E.sum() == was.load_E.sum()
    untouched = ~served(was, expert)
    assert torch.equal(now.expert_ids_TK[untouched], was.expert_ids_TK[untouched])
    assert torch.equal(now.gates_TK[untouched], was.gates_TK[untouched])


def test_suppression_changes_only_what_its_tokens_reach(tiny_recipe):
    """In the last layer no token passes anything on: the logits of the others are the same bits."""
    model = varied(tiny_recipe("moe-cosine"))
    before, routings = run(model)
    after, _ = run(model, Suppress(layer=1, expert=1))
    changed = (before != after).any(-1).flatten()
    assert torch.equal(changed, served(routings[1], 1))


def test_a_suppressed_experts_tokens_go_where_they_would_without_it(model):
    """The choice and gates are those of a router that never had the expert."""
    _, before = run(model)
    _, after = run(model, Suppress(layer=0, expert=2))
    scores_TE = before[0].scores_TE.clone()
    scores_TE[:, 2] = -torch.inf
    bias_E = model.routers()[0].selection_bias_E
    expected_TK = (scores_TE + bias_E).topk(2, -1).indices
    moved = served(before[0], 2)
    assert torch.equal(after[0].expert_ids_TK[moved], expected_TK[moved])
    chosen_TK = scores_TE.gather(1, expected_TK)
    torch.testing.assert_close(
        after[0].gates_TK[moved], chosen_TK.softmax(-1)[moved], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("by", [0.7, 50.0, -50.0])
def test_boost_adds_to_the_score(model, by):
    _, before = run(model)
    _, after = run(model, Boost(layer=1, expert=1, by=by))
    scores_TE = before[1].scores_TE.clone()
    scores_TE[:, 1] += by
    expected_TK = (scores_TE + model.routers()[1].selection_bias_E).topk(2, -1).indices
    assert torch.equal(after[1].expert_ids_TK.sort().values, expected_TK.sort().values)
    assert by < 50 or served(after[1], 1).all()
    assert by > -50 or not served(after[1], 1).any()
    gates_TK = scores_TE.gather(1, after[1].expert_ids_TK).softmax(-1)
    touched = served(after[1], 1) | served(before[1], 1)
    torch.testing.assert_close(after[1].gates_TK[touched], gates_TK[touched], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_pinned_expert_comes_first_for_every_token(model, top_k):
    for router in model.routers():
        router.top_k = top_k
        router.selection_bias_E.normal_(0, 3)
    _, after = run(model, Pin(layer=0, expert=3))
    assert (after[0].expert_ids_TK[:, 0] == 3).all()
    assert after[0].gates_TK.isfinite().all()
    assert all(len(set(ids)) == top_k for ids in after[0].expert_ids_TK.tolist())


def test_two_pinned_experts_are_both_chosen(model):
    _, after = run(model, Pin(layer=0, expert=3), Pin(layer=0, expert=1))
    assert torch.equal(after[0].expert_ids_TK.sort().values.unique(dim=0), torch.tensor([[1, 3]]))


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("by", [0.0, 0.25, 4.0])
def test_scale_multiplies_gates(model, by, renormalise):
    _, before = run(model)
    _, after = run(model, Scale(layer=0, expert=0, by=by, renormalise=renormalise))
    was, now = before[0], after[0]
    assert torch.equal(was.expert_ids_TK, now.expert_ids_TK)
    expected_TK = torch.where(was.expert_ids_TK == 0, was.gates_TK * by, was.gates_TK)
    if renormalise:
        ratio = was.gates_TK.sum(-1, keepdim=True) / expected_TK.sum(-1, keepdim=True)
        expected_TK = expected_TK * ratio
    torch.testing.assert_close(now.gates_TK, expected_TK)
    assert torch.equal(now.gates_TK[~served(was, 0)], was.gates_TK[~served(was, 0)])


def test_renormalising_one_silenced_expert_of_one_stays_finite(model):
    for router in model.routers():
        router.top_k = 1
    expert = int(run(model)[1][0].load_E.argmax())
    logits, routings = run(model, Scale(layer=0, expert=expert, by=0.0, renormalise=True))
    assert logits.isfinite().all() and served(routings[0], expert).any()


def moe_output(model: LanguageModel, layer: int, *edits):
    """(input, output without the shared expert) of one routed layer under edits."""
    kept = []
    backend = model.routed_layers()[layer].backend
    handle = backend.register_forward_hook(lambda m, given, out: kept.append((*given, out)))
    try:
        _, routings = run(model, *edits)
    finally:
        handle.remove()
    return kept[0][0], routings[layer], kept[0][2]


def one_expert(model: LanguageModel, layer: int, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
    """One expert's output on every token."""
    experts = model.routed_layers()[layer].backend.experts
    counts_E = torch.zeros(4, dtype=torch.int64)
    counts_E[expert] = len(x_TD)
    with torch.no_grad():
        return experts(x_TD, counts_E)


@pytest.mark.parametrize("output", ["zero", 1, "vector"])
def test_replace_gives_another_output_in_its_place(model, output):
    expert, width = 2, model.config.width
    vector = tuple(torch.linspace(-1, 1, width).tolist())
    x_TD, routing, own_TD = moe_output(model, 0)
    edit = Replace(layer=0, expert=expert, output=vector if output == "vector" else output)
    _, _, out_TD = moe_output(model, 0, edit)
    gate_T1 = (routing.gates_TK * (routing.expert_ids_TK == expert)).sum(-1, keepdim=True)
    new_TD = {
        "zero": torch.zeros(width),
        "vector": torch.tensor(vector),
        1: one_expert(model, 0, 1, x_TD),
    }[output]
    expected_TD = own_TD + gate_T1 * (new_TD - one_expert(model, 0, expert, x_TD))
    torch.testing.assert_close(out_TD, expected_TD, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strength", [0.5, -0.5])
def test_towards_moves_the_given_vectors(model, strength):
    router = model.routers()[1]
    rows_ED = router.anchors if hasattr(router, "anchors") else router.weight
    unit_D = torch.nn.functional.normalize(rows_ED[2].detach(), dim=0)
    x_TD, _, _ = moe_output(model, 1)
    moved_TD, _, _ = moe_output(model, 1, Towards(layer=1, expert=2, strength=strength))
    expected_TD = x_TD + strength * x_TD.norm(dim=-1, keepdim=True) * unit_D
    torch.testing.assert_close(moved_TD, expected_TD, atol=1e-4, rtol=1e-4)


def test_towards_an_anchor_raises_its_cosine(tiny_recipe):
    model = varied(tiny_recipe("moe-cosine"))
    _, before = run(model)
    _, after = run(model, Towards(layer=0, expert=2, strength=2.0))
    assert (after[0].scores_TE[:, 2] > before[0].scores_TE[:, 2]).all()
    assert (after[0].expert_ids_TK[:, 0] == 2).float().mean() > 0.9


def test_padding_stays_out_of_the_load(model):
    valid_BT = torch.ones_like(IDS, dtype=torch.bool)
    valid_BT[0, :9] = False
    with torch.no_grad(), steered(model, steering(Suppress(layer=0, expert=0))):
        routing = model(IDS, valid_BT=valid_BT).routings[0]
    assert routing.load_E.sum() == 2 * valid_BT.sum() and routing.valid_count == valid_BT.sum()


def test_decoding_step_by_step_equals_the_whole_text(model):
    edits = (Suppress(layer=0, expert=1), Boost(layer=1, expert=2, by=1.5))
    whole, _ = run(model, *edits)
    with torch.no_grad(), steered(model, steering(*edits)):
        state = model.new_state()
        pieces = [model(IDS[:, t : t + 1], state=state).logits for t in range(IDS.shape[1])]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_a_gpu_is_steered_like_the_cpu(model):
    """Every kind of edit, with vectors that a card brings from the CPU."""
    vector = tuple(torch.linspace(-1, 1, model.config.width).tolist())
    edits = (
        Suppress(layer=0, expert=1),
        Boost(layer=0, expert=2, by=1.5),
        Pin(layer=1, expert=0),
        Scale(layer=1, expert=3, by=0.5, renormalise=True),
        Towards(layer=0, expert=3, strength=0.3, direction=vector),
        Replace(layer=1, expert=2, output=vector),
    )
    here, _ = run(model, *edits)
    with steered(model.to("cuda"), steering(*edits)):
        there = model(IDS.to("cuda")).logits.cpu()
    torch.testing.assert_close(there, here, atol=1e-3, rtol=1e-3)


def test_compiled_kernels_and_torch_functions_are_steered_alike(tiny_recipe, monkeypatch):
    model = varied(tiny_recipe("moe-cosine"))
    edits = (Suppress(layer=0, expert=1), Scale(layer=1, expert=0, by=2.0))
    compiled, _ = run(model, *edits)
    monkeypatch.setattr("sra_ds.ops.cosine_route.runs_compiled", lambda *given: False)
    plain, _ = run(model, *edits)
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)


def test_a_card_keeps_every_kind_of_edit(tmp_path):
    card = Steering(
        name="all",
        made_for="run, step 7",
        edits=(
            Suppress(layer=0, expert=1),
            Boost(layer=0, expert=2, by=-1.25),
            Pin(layer=1, expert=0),
            Scale(layer=1, expert=1, by=0.5, renormalise=True),
            Towards(layer=0, expert=0, strength=0.1, direction=(0.1, 0.2)),
            Replace(layer=1, expert=3, output=(1.0, -1e-7)),
            Replace(layer=1, expert=2, output=0),
        ),
    )
    save_card(card, tmp_path / "cards" / "all.json")
    assert load_card(tmp_path / "cards" / "all.json") == card


BAD_CARDS = {
    "not json": "{",
    "no edits": '{"name": "x"}',
    "unknown kind": '{"edits": [{"kind": "hide", "layer": 0, "expert": 0}]}',
    "unknown key": '{"edits": [{"kind": "suppress", "layer": 0, "expert": 0, "by": 1}]}',
    "negative layer": '{"edits": [{"kind": "suppress", "layer": -1, "expert": 0}]}',
    "not a number": '{"edits": [{"kind": "boost", "layer": 0, "expert": 0, "by": NaN}]}',
    "a list": "[]",
    "later schema": '{"schema_version": 2, "edits": []}',
}


@pytest.mark.parametrize("text", BAD_CARDS.values(), ids=BAD_CARDS.keys())
def test_a_bad_card_is_named(tmp_path, text):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(ConfigError, match=r"card\.json"):
        load_card(tmp_path / "card.json")


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ((Suppress(layer=2, expert=0),), "2 routed layers"),
        ((Suppress(layer=0, expert=4),), "4 experts"),
        (tuple(Suppress(layer=1, expert=e) for e in range(3)), "leaves 1 experts of layer 1"),
        ((Replace(layer=0, expert=0, output=(1.0,)),), "its vector has 1 numbers"),
        ((Towards(layer=0, expert=0, strength=1, direction=(1.0,) * 31),), "31 numbers"),
        ((Replace(layer=0, expert=0, output=4),), "no expert 4"),
    ],
)
def test_edits_that_do_not_fit_are_refused(model, edits, words):
    with pytest.raises(ConfigError, match=words), steered(model, steering(*edits)):
        pass


def test_a_router_without_scores_takes_what_needs_none(tiny_recipe):
    model = varied(tiny_recipe("moe-hash"))
    before, _ = run(model)
    for edit in (Scale(layer=0, expert=1, by=0.0), Replace(layer=0, expert=1)):
        assert not torch.equal(run(model, edit)[0], before)
    for edit in (Suppress(layer=0, expert=1), Towards(layer=0, expert=1, strength=1.0)):
        with pytest.raises(ConfigError, match="this router has no"):
            run(model, edit)


def test_cards_steer_generation_evaluation_and_explanation(make_run, call, tmp_path):
    run_dir = make_run().path
    made = call("steer", "--run", run_dir, "--json", "suppress", "0:1", "1:2", "--out",
                tmp_path / "card.json", "--measure-tokens", "500").tree  # fmt: skip
    assert made["cost"]["after"] != made["cost"]["before"]
    options = ("--run", run_dir, "--json")
    scored = [
        call("evaluate", *options, "--health-tokens", "0", *steer).tree
        for steer in ((), ("--steer", tmp_path / "card.json"))
    ]
    assert scored[0]["nll_per_token"] != scored[1]["nll_per_token"]
    assert "steering" not in scored[0] and scored[1]["steering"].endswith("card.json")
    texts = [
        call("generate", *options, "--prompt", "abc", "--max-tokens", 12, *steer).tree["text"]
        for steer in ((), ("--steer", tmp_path / "card.json"))
    ]
    assert texts[0] != texts[1]
    explained = call(
        "explain_routing", *options, "--text", "abc def", "--steer", tmp_path / "card.json"
    ).tree
    chosen = [c["expert"] for t in explained["tokens"] for c in t["layers"][0]["chosen"]]
    assert chosen and 1 not in chosen


def test_no_card_is_no_steering(model):
    with steered_by(SimpleNamespace(model=model), None):
        assert not any("forward" in vars(module) for module in model.modules())


def test_wrong_arguments_of_steer(make_run, call, tmp_path):
    run_dir, out = make_run().path, tmp_path / "c.json"
    call("steer", "--run", run_dir, "suppress", "0-1", "--out", out).refused("0-1", "LAYER:EXPERT")
    call("steer", "--run", run_dir, "suppress", "5:1", "--out", out).refused("2 routed layers")
    call("steer", "--run", run_dir, "boost", "0:1", "--by", "nan", "--out", out).refused("--by")
    call("steer", "--run", run_dir, "scale", "0:1", "--by", "-1", "--out", out).refused("--by")
    dense = make_run("dense", name="dense").path
    call("steer", "--run", dense, "suppress", "0:1", "--out", out).refused("no routed layers")
    (tmp_path / "one.txt").write_text("only one\n")
    call("steer", "--run", run_dir, "detect", "--with", tmp_path / "one.txt", "--without",
         tmp_path / "one.txt").refused("one.txt", "two texts")  # fmt: skip
    call("steer", "--run", run_dir, "detect", "--with", tmp_path / "none.txt", "--without",
         tmp_path / "one.txt").refused("none.txt")  # fmt: skip
    assert not out.exists()


def test_a_card_says_which_run_it_is_for(make_run, call, tmp_path):
    call("steer", "--run", make_run().path, "pin", "0:1", "--out", tmp_path / "c.json",
         "--measure-tokens", 0, "--name", "calm")  # fmt: skip
    card = json.loads((tmp_path / "c.json").read_text())
    assert card["made_for"] == "run, step 7" and card["name"] == "calm"


def test_a_card_of_another_run_is_told(make_run, call, tmp_path):
    card = tmp_path / "card.json"
    made, other = make_run(name="made").path, make_run(name="other").path
    call("steer", "--run", made, "suppress", "0:1", "--out", card, "--measure-tokens", 0)
    prompt = ("--prompt", "a", "--max-tokens", 2, "--steer", card)
    assert "warning" not in call("generate", "--run", made, *prompt).err
    told = call("generate", "--run", other, *prompt)
    assert told.code == 0 and "was made for made, step 7; this is other, step 7" in told.err


def test_a_card_replaces_only_a_card(make_run, call, tmp_path):
    run, card, notes = make_run().path, tmp_path / "card.json", tmp_path / "notes.txt"
    make = ("steer", "--run", run, "suppress", "0:1", "--measure-tokens", 0, "--out")
    for _ in range(2):
        assert call(*make, card).code == 0
    notes.write_text("mine")
    call(*make, notes).refused("is no steering card; choose another --out")
    with pytest.raises(ConfigError, match="no steering card"):
        save_card(steering(), notes)
    assert notes.read_text() == "mine"
    call(*make, tmp_path).refused("is a directory; name a file")
    assert not list(tmp_path.parent.glob("*.partial"))


def test_common_options_may_stand_behind_the_action(make_run, call, tmp_path):
    options = ("--out", tmp_path / "card.json", "--measure-tokens", 0, "--json")
    assert "card" in call("steer", "--run", make_run().path, "suppress", "0:1", *options).tree
