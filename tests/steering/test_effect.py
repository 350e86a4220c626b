"""A card's effect on words: values by hand, prompts at their ends, a null of the same edits elsewhere."""

import numpy as np
import pytest
import torch

from sra_ds.config.steering import Boost, Replace, Scale, Steering, Suppress, Towards
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import ConfigError
from sra_ds.inference.load import load_run
from sra_ds.inference.steer import made_for, save_card, steered, text_mark
from sra_ds.steering.effect import (
    WordSets,
    effect,
    elsewhere,
    log_probs,
    nearest_in_load,
    neutral_batches,
    prompt_batches,
    read_words,
    word_tokens,
)

WORDS = WordSets([10, 20, 30], [11, 21])
EDIT = Scale(layer=0, expert=1, by=0.0)


def test_measures_by_hand(traced):
    loaded, split, _ = traced
    batches = neutral_batches(loaded, split, 70)
    found = read_words(loaded.model, batches, WORDS)
    window = 0
    for batch in batches:
        for row in log_probs(loaded.model, batch).double().exp():
            counted = 70 - 64 if window == 4 else 16
            own = row[-counted:, WORDS.own_S].sum(-1)  # a short window keeps its context
            odds = (own / row[-counted:, WORDS.others_S].sum(-1)).log()
            assert found["share"][window] == pytest.approx(float(own.mean()), rel=1e-5)
            others = row[-counted:, WORDS.others_S].sum(-1)
            assert found["others"][window] == pytest.approx(float(others.mean()), rel=1e-5)
            assert found["log_odds"][window] == pytest.approx(float(odds.mean()), abs=1e-5)
            assert found["imbalance"][window] == pytest.approx(float(odds.abs().mean()), abs=1e-5)
            window += 1
    assert window == 5
    spread_B = np.abs(found["log_odds"] - found["log_odds"].mean())
    assert np.array_equal(found["spread"], spread_B)


def test_without_other_words_there_are_no_odds(traced):
    loaded, split, _ = traced
    batches = neutral_batches(loaded, split, 40)
    assert list(read_words(loaded.model, batches, WordSets([3], []))) == ["share"]


def test_a_prompt_is_read_at_its_end_whatever_stands_beside_it(loaded):
    prompts = ["the cat", "a long sentence about nothing at all , and more of it", "one"]
    together = read_words(loaded.model, prompt_batches(loaded, prompts), WORDS)
    end = end_of_text_id(loaded.tokenizer)
    for number, prompt in enumerate(prompts):
        ids = [end, *loaded.tokenizer.encode(prompt).ids][-16:]
        probs_V = loaded.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        own, others = (float(probs_V[ids_S].sum()) for ids_S in WORDS)
        assert together["share"][number] == pytest.approx(own, rel=1e-4)
        assert together["log_odds"][number] == pytest.approx(np.log(own / others), abs=1e-4)


def test_an_effect_is_the_difference_of_two_readings(traced):
    loaded, split, trace = traced
    steering, batches = Steering(edits=(EDIT,)), neutral_batches(loaded, split, 70)
    found = effect(loaded, steering, batches, WORDS, trace)
    before = read_words(loaded.model, batches, WORDS)
    with steered(loaded.model, steering):
        after = read_words(loaded.model, batches, WORDS)
    for name, one in found.items():
        assert one.before == before[name].mean() and one.after == after[name].mean()
        assert one.change.value == pytest.approx(one.after - one.before, abs=1e-9)
        assert one.change.low <= one.change.value <= one.change.high
        assert 1 / 4 <= one.change.p <= 1  # three other experts


def test_a_card_that_changes_nothing_has_no_effect(traced):
    loaded, split, trace = traced
    neutral = Steering(edits=(Scale(layer=0, expert=1, by=1.0),))
    found = effect(loaded, neutral, neutral_batches(loaded, split, 70), WORDS, trace)
    assert all(one.change.value == 0 and one.change.p == 1 for one in found.values())


def test_the_null_moves_all_edits_of_an_expert_together(traced):
    *_, trace = traced
    edits = (
        Boost(layer=1, expert=0, by=1.0),
        Scale(layer=1, expert=0, by=2.0),
        Suppress(layer=1, expert=1),
    )
    moved = elsewhere(Steering(edits=edits), trace)
    assert moved
    for other in moved:
        boost, scale, suppress = other.edits
        assert boost.expert == scale.expert != suppress.expert
        assert boost.expert != 0 and suppress.expert != 1
        assert (boost.by, scale.by, suppress.layer) == (1.0, 2.0, 1)


def test_no_two_experts_edits_go_to_one(traced):
    *_, trace = traced
    served = np.flatnonzero(trace.load_LE[1])
    edits = tuple(Boost(layer=1, expert=int(e), by=float(e)) for e in served)
    moved = elsewhere(Steering(edits=edits), trace)
    assert len(served) > 2 and moved
    for other in moved:
        assert {edit.expert for edit in other.edits} == set(served.tolist())
        assert all(own.expert != new.expert for own, new in zip(edits, other.edits, strict=True))


def test_the_null_is_in_the_order_of_nearest_load(traced):
    *_, trace = traced
    load_E = trace.load_LE[0]
    others = [other.edits[0].expert for other in elsewhere(Steering(edits=(EDIT,)), trace)]
    assert others == nearest_in_load(trace, 0, 1) and 1 not in others
    distances = np.abs(load_E[others] - load_E[1])
    assert (np.diff(distances) >= 0).all()


def test_a_centroid_moves_with_its_expert(traced):
    *_, trace = traced
    own = tuple(trace.centroids_LED[0, 1].tolist())
    given = Steering(edits=(Towards(layer=0, expert=1, strength=0.5, direction=own),))
    for other in elsewhere(given, trace):
        (edit,) = other.edits
        assert edit.direction == tuple(trace.centroids_LED[0, edit.expert].tolist()) != own
    anchored = Steering(edits=(Towards(layer=0, expert=1, strength=0.5),))
    assert {other.edits[0].direction for other in elsewhere(anchored, trace)} == {"anchor"}


def test_a_replacement_elsewhere_is_never_by_itself(traced):
    *_, trace = traced
    near = nearest_in_load(trace, 0, 1)[0]
    given = Steering(edits=(Replace(layer=0, expert=1, output=near),))
    edits = [other.edits[0] for other in elsewhere(given, trace)]
    assert edits and all(edit.output != edit.expert for edit in edits)
    assert [edit.output for edit in edits] == [1] + [near] * (len(edits) - 1)


def test_words_are_single_tokens_after_a_space_first(loaded):
    tokenizer = loaded.tokenizer
    inside = tokenizer.encode(" a").ids
    assert len(inside) == 1 and word_tokens(tokenizer, ["a"]) == inside
    assert word_tokens(tokenizer, ["a", "a"]) == inside
    with pytest.raises(ConfigError, match=r"'incomprehensible' is no single token .*pieces"):
        word_tokens(tokenizer, ["incomprehensible"])


def test_the_command(make_run, call, tmp_path):
    run, card = make_run().path, tmp_path / "card.json"
    save_card(Steering(name="quiet", edits=(EDIT,)), card)
    options = ("--words", "a", "--against", "b", "--tokens", 64, "--trace-tokens", 300)
    tree = call("steer", "--run", run, "--json", "effect", card, *options).tree
    assert tree["name"] == "quiet" and tree["units"] == 4
    assert set(tree["effect"]) == {"share", "others", "log_odds", "imbalance", "spread"}
    assert tree["cost"]["before"] > 1 and tree["cost"]["divergence"] > 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo words\n\nthree more words\n")
    shown = call("steer", "--run", run, "effect", card, *options, "--prompts", prompts).out
    assert "log_odds" in shown and "null" in shown and "3" in shown
    effect = ("steer", "--run", run, "effect", card)
    call(*effect, "--words", "a", "--against", "a").refused("--words and in --against")
    call(*effect, "--words", " ").refused("a word is empty")
    call(*effect, "--words", "a", "--tokens", 0).refused("--tokens must be at least 1")
    call("steer", "--run", run, "effect", tmp_path / "no.json", "--words", "a").refused("no.json")


def test_a_card_of_another_run_is_told(make_run, call, tmp_path):
    run, card = make_run().path, tmp_path / "card.json"
    effect = ("steer", "--run", run, "effect", card, "--words", "a", "--tokens", 64)
    for made, told in (("other, step 7", True), (made_for(load_run(run)), False), ("", False)):
        save_card(Steering(made_for=made, edits=(EDIT,)), card)
        warning = f"warning: {card} was made for other, step 7; this is run, step 7\n"
        assert (warning in call(*effect, "--trace-tokens", 300).err) == told


def test_a_card_measured_on_what_it_was_found_on_is_told(make_run, call, tmp_path):
    run, card = make_run().path, tmp_path / "card.json"
    own, copy, other = (tmp_path / name for name in ("own.txt", "copy.txt", "other.txt"))
    own.write_text("abc def ghi\n" * 60)
    copy.write_text(own.read_text())
    other.write_text("ghi def abc\n" * 60)
    mark = text_mark(load_run(run), files=own)
    save_card(Steering(description=f"found on own.txt ({mark})", edits=(EDIT,)), card)
    effect = ("steer", "--run", run, "effect", card, "--words", "a", "--tokens", 64)
    effect += ("--trace-tokens", 300)
    warning = f"warning: {card}, found on own.txt ({mark}), is measured there, too\n"
    for text, told in ((own, True), (copy, True), (other, False)):
        assert (warning in call(*effect, "--text", text).err) == told
        evaluated = call("evaluate", "--run", run, "--steer", card, "--text", text)
        assert (warning in evaluated.err) == told
    assert "is measured" not in call(*effect).err
