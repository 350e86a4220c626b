"""Detection: risk differences against counts by hand, p under a null, and a model that truly differs."""

import numpy as np
import pytest
import torch

from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import DataError
from sra_ds.inference.load import load_run
from sra_ds.steering.detect import detect, rank, read_texts, risk_difference, routes_of_texts

TEXTS = ["abc def", "g", "hij abc hij abc", "def def gab gab hij hij abc abc" * 3]


def test_routes_of_texts_are_those_of_each_text_alone(make_run):
    loaded = load_run(make_run().path)
    counts_XLE, tokens_X = routes_of_texts(loaded, TEXTS)
    length = loaded.recipe.data.sequence_length
    for text, counts_LE, tokens in zip(TEXTS, counts_XLE, tokens_X, strict=True):
        ids = [end_of_text_id(loaded.tokenizer), *loaded.tokenizer.encode(text).ids][:length]
        with torch.no_grad():
            routings = loaded.model(torch.tensor([ids])).routings
        for routing, counts_E in zip(routings, counts_LE, strict=True):
            expected_E = torch.bincount(routing.expert_ids_TK[1:].flatten(), minlength=4)
            assert counts_E.tolist() == expected_E.tolist()
        assert tokens == len(ids) - 1 and (counts_LE.sum(-1) == 2 * tokens).all()


def test_risk_difference_by_hand():
    counts_XP = np.array([[3.0, 1.0], [1.0, 3.0], [0.0, 10.0]])
    tokens_X = np.array([4.0, 4.0, 10.0])
    choices_RX = np.array([[True, True, False], [True, False, False]])
    found = risk_difference(counts_XP, tokens_X, choices_RX)
    expected = np.array([[4 / 8 - 0.0, 4 / 8 - 1.0], [3 / 4 - 1 / 14, 1 / 4 - 13 / 14]])
    assert found == pytest.approx(expected)
    assert risk_difference(counts_XP, tokens_X, choices_RX[0]) == pytest.approx(expected[0])


def test_an_expert_that_serves_one_kind_of_text_is_found(make_run):
    loaded = load_run(
        make_run("moe-hash").path
    )  # the hash of a token decides, whatever stands beside
    with_it, without = ["abc " * n for n in (2, 3, 4, 5, 6)], ["hij " * n for n in (2, 3, 4, 5, 6)]
    first = detect(loaded, with_it, without)[0]
    counts_XLE, tokens_X = routes_of_texts(loaded, [*with_it, *without])
    expected_P = risk_difference(counts_XLE.reshape(10, -1), tokens_X, np.arange(10) < 5)
    assert abs(first["risk_difference"]) == pytest.approx(np.abs(expected_P).max())
    assert first["p"] < 0.02 and first["low"] <= first["risk_difference"] <= first["high"]
    assert first["low"] > 0 or first["high"] < 0


def test_ranked_by_the_size_of_the_difference_and_complete(make_run):
    rows = detect(load_run(make_run().path), TEXTS, [*TEXTS[::-1], "jj abc"])
    sizes = [abs(row["risk_difference"]) for row in rows]
    assert sizes == sorted(sizes, reverse=True) and len(rows) == 8
    assert all(row["p_adjusted"] >= row["p"] for row in rows)


def test_equal_sets_show_nothing(make_run):
    rows = detect(load_run(make_run().path), TEXTS, TEXTS)
    assert all(row["risk_difference"] == 0 and row["p"] == 1 for row in rows)


def test_false_alarms_are_as_rare_as_p_says():
    """Texts of one kind, split at random: p below 0.2 for about a fifth of the experts."""
    rng = np.random.default_rng(1)
    small = 0
    for _ in range(40):
        counts_XLE = rng.binomial(20, 0.3, (16, 1, 5)).astype(float)
        rows = rank(counts_XLE, np.full(16, 20.0), np.arange(16) < 8)
        small += sum(row["p"] <= 0.2 for row in rows)
    assert 20 <= small <= 60  # 40 of 200 expected


def test_one_expert_among_many_is_not_lost_by_adjusting():
    """The smallest p that can be found, times all experts, has to lie below 0.05."""
    counts_XLE = np.random.default_rng(2).binomial(20, 0.3, (40, 4, 64)).astype(float)
    counts_XLE[:20, 2, 5] += 10
    counts_XLE[:, 3, 63] = np.nan
    first, second, *others = rank(counts_XLE, np.full(40, 20.0), np.arange(40) < 20)
    assert (first["layer"], first["expert"]) == (2, 5) and first["p_adjusted"] < 0.05
    assert second["p_adjusted"] > 0.05 and len(others) == 4 * 64 - 3


def test_files_that_are_no_sets_of_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo\n", "utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one", "two"]
    (tmp_path / "b.txt").write_text("one\n\n", "utf-8")
    with pytest.raises(DataError, match=r"b\.txt: needs at least two texts"):
        read_texts(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\n\xff")
    with pytest.raises(DataError, match=r"c\.txt: not UTF-8"):
        read_texts(tmp_path / "c.txt")


def test_the_command_ranks_experts(make_run, call, tmp_path):
    for name, words in (("a", "abc def"), ("b", "hij gab")):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{words} " * n for n in range(1, 7)))
    options = ("detect", "--with", tmp_path / "a.txt", "--without", tmp_path / "b.txt")
    run = make_run().path
    tree = call("steer", "--run", run, "--json", *options).tree
    assert tree["texts"] == [6, 6] and len(tree["experts"]) == 8
    shown = call("steer", "--run", run, *options, "--top", 3).out.splitlines()
    first = tree["experts"][0]
    assert shown[0].startswith(f"{first['layer']}:{first['expert']}") and "adjusted" in shown[2]
