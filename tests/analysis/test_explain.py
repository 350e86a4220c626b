"""The explanation of a text says what the model itself decided."""

import json

import pytest
import torch

from sra_ds.analysis.explain import explain
from sra_ds.config.steering import Steering, Suppress
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import DataError
from sra_ds.inference.load import load_run
from sra_ds.inference.steer import steered
from sra_ds.moe.routers import anchor_rows

TEXT = "abc def gab hij"
ROUTERS = ["moe-cosine", "moe-linear", "moe-hash", "moe-swiglu-shared"]


@pytest.mark.parametrize("family", ROUTERS)
def test_choices_gates_and_scores_are_the_models(make_run, family):
    loaded = load_run(make_run(family).path)
    found = explain(loaded, TEXT, near=2)
    ids = [end_of_text_id(loaded.tokenizer), *loaded.tokenizer.encode(TEXT).ids]
    assert len(found.tokens) == len(ids) > 4
    length = loaded.recipe.data.sequence_length
    with torch.no_grad():
        routings = loaded.model(torch.tensor([ids[:length]]), keep_scores=True).routings
    for token, layers in enumerate(found.decisions[:length]):
        for routing, decision in zip(routings, layers, strict=True):
            assert [c.expert for c in decision.chosen] == routing.expert_ids_TK[token].tolist()
            for choice, gate in zip(decision.chosen, routing.gates_TK[token], strict=True):
                assert choice.gate == pytest.approx(float(gate), abs=1e-6)
                score = float(routing.scores_TE[token, choice.expert])
                assert choice.score == pytest.approx(score, abs=1e-5)


def test_cosines_are_those_of_token_and_anchor(make_run):
    loaded = load_run(make_run("moe-swiglu-shared").path)
    kept = []
    router = loaded.model.routers()[0]
    handle = router.register_forward_hook(lambda m, given, out: kept.append(given[0]))
    found = explain(loaded, "abc", near=9)
    handle.remove()
    cosine_TE = torch.nn.functional.cosine_similarity(
        kept[0][:, None], anchor_rows(router).detach()[None], dim=-1
    )
    for token, layers in enumerate(found.decisions):
        every = [*layers[0].chosen, *layers[0].near]
        assert sorted(c.expert for c in every) == [0, 1, 2, 3]
        for choice in every:
            assert choice.cosine == pytest.approx(float(cosine_TE[token, choice.expert]), abs=1e-5)


def test_near_misses_are_the_next_best_and_the_margin_is_the_lead(make_run):
    run = make_run("moe-linear", {"model": {"channel": {"router": {"bias": False}}}})
    loaded = load_run(run.path)
    for router in loaded.model.routers():
        router.selection_bias_E.zero_()
    for layers in explain(loaded, TEXT, near=2).decisions:
        for decision in layers:
            scores = [c.score for c in (*decision.chosen, *decision.near)]
            assert scores == sorted(scores, reverse=True) and len(scores) == 4
            assert decision.margin == pytest.approx(scores[1] - scores[2]) and decision.margin >= 0
            assert all(choice.cosine is None for choice in decision.chosen)


def test_a_long_text_goes_through_in_windows(make_run):
    loaded = load_run(make_run().path)
    found = explain(loaded, TEXT * 9)
    assert len(found.tokens) > 2 * loaded.recipe.data.sequence_length
    assert len(found.decisions) == len(found.tokens)
    begin = loaded.recipe.data.sequence_length
    ids = loaded.tokenizer.encode(TEXT * 9).ids[begin - 1 : 2 * begin - 1]
    with torch.no_grad():
        alone = loaded.model(torch.tensor([ids])).routings[1].expert_ids_TK
    chosen = [[c.expert for c in layers[1].chosen] for layers in found.decisions[begin : 2 * begin]]
    assert chosen == alone.tolist()


def test_what_is_known_comes_from_the_analysis(make_run, call):
    run = make_run()
    assert explain(load_run(run.path), TEXT).known == {}
    made = call("analyze", "--run", run.path, "--json", "--sweep-tokens", 0)
    assert made.code == 0, made.err
    known = explain(load_run(run.path), TEXT).known
    experts = json.loads((run.path / "analysis.json").read_text())["experts"]
    assert set(known) == {f"{e['layer']}:{e['expert']}" for e in experts} and len(known) == 8
    assert known["1:2"]["top_tokens"] == experts[6]["top_tokens"][:5]


def test_suppressed_experts_are_no_near_misses(make_run):
    """Their score is minus infinity, which no page could read."""
    loaded = load_run(make_run().path)
    edits = (Suppress(layer=0, expert=0), Suppress(layer=0, expert=3))
    with steered(loaded.model, Steering(edits=edits)):
        found = explain(loaded, TEXT)
    for layers in found.decisions:
        assert not layers[0].near and layers[0].margin is None
        assert len(layers[1].near) == 2
    json.dumps(found.as_dict(), allow_nan=False)


def test_margins_do_not_need_the_near_misses_shown(make_run):
    loaded = load_run(make_run().path)
    few, many = (explain(loaded, TEXT, near) for near in (0, 2))
    for own, other in zip(few.decisions, many.decisions, strict=True):
        assert [d.margin for d in own] == [d.margin for d in other]
        assert not any(d.near for d in own)


def test_the_analysis_of_another_step_or_of_another_form_is_left_out(make_run):
    loaded = load_run(make_run().path)
    expert = {"layer": 0, "expert": 1, "specialisation": "semantic", "top_tokens": ["a"]}
    step = loaded.trainer["step"]
    for of_step, schema, known in ((step, 2, 1), (step + 1, 2, 0), (step, 1, 0)):
        content = {"schema_version": schema, "step": of_step, "experts": [expert]}
        (loaded.run.path / "analysis.json").write_text(json.dumps(content))
        assert len(explain(loaded, TEXT).known) == known


def test_nothing_to_explain(make_run):
    with pytest.raises(DataError, match="empty"):
        explain(load_run(make_run().path), "")
    with pytest.raises(DataError, match="no routed layers"):
        explain(load_run(make_run("dense", name="dense").path), TEXT)


def test_the_command_prints_a_line_for_each_token_and_layer(make_run, call, tmp_path):
    run = make_run().path
    page = tmp_path / "page.html"
    result = call("explain_routing", "--run", run, "--text", TEXT, "--html", page)
    tokens = len(explain(load_run(run), TEXT).tokens)
    header, *lines = [line for line in result.out.splitlines() if not line.startswith("open ")]
    assert result.code == 0 and len(lines) == 2 * tokens and header.startswith("token ")
    assert "<|endoftext|>" in lines[0] and page.is_file()
    one = call("explain_routing", "--run", run, "--text", TEXT, "--layer", 1)
    assert len(one.out.splitlines()) == 1 + tokens
    tree = call("explain_routing", "--run", run, "--text", TEXT, "--json").tree
    assert len(tree["tokens"]) == tokens and len(tree["tokens"][0]["layers"]) == 2
    explained = ("explain_routing", "--run", run, "--text")
    call(*explained, "").refused("empty")
    call(*explained, "a", "--layer", 2).refused("--layer 2: the model has 2 routed layers")
    call(*explained, "a", "--html", tmp_path).refused("is a directory; name a file")
    call("explain_routing", "--run", run / "none", "--text", "a").refused("not a run directory")


def test_markup_in_a_text_stays_text(make_run, call, tmp_path):
    run, page = make_run().path, tmp_path / "page.html"
    made = call(
        "explain_routing", "--run", run, "--text", "</script><b>&amp;", "--html", page, "--json"
    )
    assert made.code == 0, made.err
    html = page.read_text("utf-8")
    assert "</script><b>" not in html and html.count("<script") == html.count("</script>") == 2
