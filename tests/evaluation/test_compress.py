"""Compressed runs: the same model from its live weights alone."""

import pytest

from sra_ds.inference.load import load_run

CHANNEL = {"kind": "prime_masked", "feed_forward": {"hidden": 64}, "primes": [3, 5]}


def test_a_compressed_run_computes_the_same_from_fewer_bytes(make_run, call, tmp_path) -> None:
    run, out = make_run("resonance").path, tmp_path / "small"
    found = call("convert_checkpoint", "--run", run, "--out", out, "--compress", "--json").tree
    before, after = found["before"], found["after"]
    assert after["nll_per_token"] == pytest.approx(before["nll_per_token"], rel=1e-6)
    assert after["tokens"] == before["tokens"] > 0
    assert after["weight_bytes"] < before["weight_bytes"]
    assert found["speed_ratio"] > 0 and found["text"] == "valid split"
    old, new = load_run(run), load_run(out)
    assert new.recipe.model.channel.storage == "blocks" and new.trainer["step"] == 7
    for block, compressed in zip(old.model.blocks, new.model.blocks, strict=True):
        for name in ("up", "down"):
            whole = block.channel.feed_forward.get_submodule(name)
            live = compressed.channel.feed_forward.get_submodule(name).values
            assert (whole.weight[whole.mask] == live).all()
    scored = call("evaluate", "--run", out, "--json").tree
    assert scored["nll_per_token"] == pytest.approx(after["nll_per_token"], rel=1e-9)


def test_it_compares_on_a_text_of_ones_own(make_run, call, tmp_path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("Some words of my own, again and again. " * 20)
    arguments = ("--run", make_run("resonance").path, "--out", tmp_path / "small")
    found = call("convert_checkpoint", *arguments, "--compress", "--text", text, "--json").tree
    assert found["text"] == "own.txt"


@pytest.mark.parametrize(
    ("family", "overlay", "words"),
    [
        ("dense", {}, "prime_masked"),
        ("resonance-blocks", {}, "already"),
        ("dense", {"model": {"channel": {**CHANNEL, "pattern": "random"}}}, "no blocks"),
    ],
    ids=["dense", "blocks", "random"],
)
def test_what_cannot_be_compressed_is_refused(
    make_run, call, tmp_path, family: str, overlay: dict, words: str
) -> None:
    run, out = make_run(family, overlay).path, tmp_path / "small"
    call("convert_checkpoint", "--run", run, "--out", out, "--compress").refused(words)
    assert not out.exists()


def test_options_that_do_nothing_are_refused(make_run, call, tmp_path) -> None:
    run, out = make_run("resonance").path, tmp_path / "small"
    arguments = ("--run", run, "--out", out, "--consolidate", "--text", run)
    call("convert_checkpoint", *arguments).refused("--text", "--compress")
