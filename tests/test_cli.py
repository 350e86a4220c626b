"""The real commands, on a real (tiny) run and on bad input."""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import commands
from commands import BIN, ROOT, train, write_corpus, write_recipe
from saved_runs import call
from sra_ds import cli

__all__ = ["call"]

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


def tool(name, *arguments, cwd=None):
    return commands.call(sys.executable, ROOT / "tools" / f"{name}.py", *arguments, cwd=cwd)


def json_of(result):
    assert result.returncode == 0, result.stderr
    return strictly(result.stdout)


def strictly(text):
    """What JSON says, whose standard has no NaN and no Infinity."""

    def refused(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refused)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, its recipe and one finished run in `run`."""
    path = tmp_path_factory.mktemp("cli")
    write_recipe(path, write_corpus(path / "text.jsonl"))
    result = train("--recipe", path / "tiny.yaml", "--run", path / "run", "--json", stage=2)
    assert result.returncode == 0, result.stderr
    (path / "summary.json").write_text(result.stdout)
    return path


@pytest.mark.parametrize("name", TOOLS)
def test_help_explains_every_tool(name):
    result = tool(name, "--help")
    assert result.returncode == 0 and "--json" in result.stdout


def test_training_prints_one_json_object_and_leaves_a_readable_run(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == json.loads((folder / "run" / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["tokens"] == 12 * 8 * 32
    assert summary["params"]["total"] > summary["params"]["active"]
    assert summary["validation"]["coverage"] == 1.0
    assert len(summary["experts"]["per_layer"]) == 2
    names = {path.name for path in (folder / "run" / "figures").glob("*.png")}
    assert {"loss.png", "perplexity.png", "learning_rate.png"} <= names
    assert {"expert_load.png", "anchor_similarity.png"} <= names
    assert (folder / "run" / "samples.txt").read_text().startswith(">>> ")


def test_dry_run_resolves_everything_and_writes_nothing(folder):
    run = folder / "never"
    facts = json_of(
        train("--recipe", folder / "tiny.yaml", "--run", run, "--dry-run", "--json", stage=2)
    )
    assert not run.exists()
    assert facts["zero_stage"] == 2
    assert facts["batches"] == {
        "batch_size": 8, "micro_batch_size": 8, "accumulation": 1, "world_size": 1
    }  # fmt: skip
    assert facts["tokens"] == 12 * 8 * 32
    assert facts["data"]["prepared"] is True
    assert facts["memory_bytes_per_process"]["total"] > 0
    assert facts["disk_bytes"]["free"] > 0


def test_the_published_counts(tmp_path):
    counts = json_of(tool("count_active_params", "--recipe", "sra-128e", "--json"))
    assert round(counts["total"] / 1e6, 1) == 558.5
    assert round(counts["active"] / 1e6, 1) == 29.0
    assert round(counts["active_with_anchors"] / 1e6, 1) == 29.3
    assert round(counts["feed_forward_and_router"] / 1e6, 1) == 8.7
    assert sum(counts["total_by_part"].values()) == counts["total"]


@pytest.mark.parametrize(
    ("recipe", "total", "active"),
    [("sra-small", 70.5, 5.3), ("dense-small", 5.3, 5.3), ("dense-29m", 29.0, 29.0)],
)
def test_counts_of_the_other_named_models(recipe, total, active):
    counts = json_of(tool("count_active_params", "--recipe", recipe, "--json"))
    assert round(counts["total"] / 1e6, 1) == total
    assert round(counts["active"] / 1e6, 1) == active


def test_evaluate_gives_the_perplexity_training_ended_with(folder):
    summary = json.loads((folder / "summary.json").read_text())
    asked = ("--run", folder / "run", "--checkpoint", "latest", "--json")
    report = json_of(tool("evaluate", *asked, "--batch-size", 3, "--health-tokens", 3000))
    expected = summary["validation"]["nll_per_token"]
    assert report["nll_per_token"] == pytest.approx(expected, abs=1e-5)
    assert report["experts"]["tokens"] >= 3000
    assert report["experts"]["enough_tokens"] is False
    sliding = json_of(tool("evaluate", *asked, "--stride", 16, "--health-tokens", 0))
    assert sliding["tokens"] == report["tokens"]


def test_evaluate_scores_the_users_own_text(folder, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("abc def ghi " * 30)
    report = json_of(
        tool("evaluate", "--run", folder / "run", "--text", path, "--legacy-sra", "--json")
    )
    assert report["words"] == 90 and report["bytes"] == 360
    assert report["coverage"] == 1.0


def test_a_perplexity_beyond_all_numbers_is_null(folder, tmp_path):
    """As that of a word is in a language that has no spaces."""
    path = tmp_path / "one-word.txt"
    path.write_text("abcdefghij" * 200)
    report = json_of(tool("evaluate", "--run", folder / "run", "--text", path, "--json"))
    assert report["words"] == 1 and report["word_perplexity"] is None
    assert math.isfinite(report["token_perplexity"])


def test_results_are_json_or_fail(capsys):
    def show(result):
        asked = argparse.Namespace(json=True, debug=False)
        assert cli.run(asked, lambda _: result, print) == 0
        return strictly(capsys.readouterr().out)

    numbers = (math.inf, -math.inf, math.nan, np.float64("nan"), 0.1, 3, True)
    expected = [None, None, None, None, 0.1, 3, True]
    assert show({"a": numbers, "b": {"c": [math.inf]}}) == {"a": expected, "b": {"c": [None]}}
    assert show({"where": Path("a/b"), "none": None}) == {"where": "a/b", "none": None}
    for value in (np.float32(1), np.int64(1), object()):
        with pytest.raises(TypeError, match="is no JSON"):
            show({"value": value})
    assert not capsys.readouterr().out


def test_a_reader_who_has_seen_enough_is_no_error():
    code = (
        "import argparse, sys; from sra_ds import cli; asked = argparse.Namespace(json=True); "
        "sys.exit(cli.run(asked, lambda _: list(range(99999)), print))"
    )
    asked = f"{{ {sys.executable} -c '{code}'; echo $? >&2; }} | head -1"
    found = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("[\n", "0\n")


ONLY_TRAINING = {
    "--set": "a=1", "--seeds": "0,1,2", "--jobs": 1, "--processes": 1, "--deepspeed": "x.json",
    "--train-in": "x",
}  # fmt: skip
IDLE = [
    *(
        (("compare", "--cells", "x", *given), "only with --recipes")
        for given in ONLY_TRAINING.items()
    ),
    (
        ("compare", "--runs", "x", "--jobs", 1),
        "--jobs has an effect only with --recipes or --sweep",
    ),
    (("bench", "router", "--recipes", "quickstart"), "--recipes has no effect on router"),
    (("bench", "step", "--batch", 8), "--batch has no effect on step"),
    (("bench", "backends", "--stages", 0, 1, 2), "--stages has no effect on backends"),
    (("bench", "scaling", "--stages"), "--stages has no effect on scaling"),
    (("bench", "latency", "--micro-batch", 2), "--micro-batch has no effect on latency"),
    (("bench", "memory", "--rounds", 7), "--rounds has no effect on memory"),
    (("evaluate", "--run", "x", "--text", "y", "--split", "valid"), "--split has no effect with"),
    (("analyze", "--run", "x", "--text", "y", "--split", "valid"), "--split has no effect with"),
    (("count_active_params", "--run", "x", "--recipe", "quickstart"), "--recipe has no effect"),
]


@pytest.mark.parametrize(("arguments", "says"), IDLE, ids=[" ".join(map(str, a)) for a, _ in IDLE])
def test_options_without_an_effect_are_refused(call, arguments, says):
    """Also where they ask for what is the default."""
    call(*arguments).refused(says, "leave it out")


def test_generate_is_seeded_and_streams_the_prompt(folder):
    asked = ("generate", "--run", folder / "run", "--prompt", "abc", "--max-tokens", 12)
    first, again = (json_of(tool(*asked, "--seed", 1, "--json"))["text"] for _ in range(2))
    assert first == again
    plain = tool(*asked, "--seed", 1)
    assert plain.stdout.strip("\n") == ("abc" + first).strip("\n")


def test_prepare_data_tells_what_it_made(folder):
    report = json_of(tool("prepare_data", "--recipe", folder / "tiny.yaml", "--json"))
    assert report["splits"]["train"]["tokens"] > report["splits"]["valid"]["tokens"] > 0
    assert report["domains"] == ["d0", "d1"]


def test_compare_runs_each_cell_once(folder, tmp_path):
    dense = tmp_path / "dense.yaml"
    dense.write_text(
        f"extends: {folder / 'tiny.yaml'}\nname: dense\n"
        "model: {channel: {kind: dense, feed_forward: {hidden: 64, dropout: 0}}}\n"
        "losses: {balance: none, dispersion: none, z_weight: 0}\n"
    )
    asked = ("compare", "--recipes", folder / "tiny.yaml", dense, "--seeds", "0,1", "--json")
    asked += ("--set", "training.steps=4", "--set", "logging.every=2", "--out", tmp_path / "out")
    result = json_of(tool(*asked))
    assert [row["recipe"] for row in result["rows"]] == ["tiny", "dense"]
    assert len(result["cells"]) == 4
    saved = yaml.safe_load((tmp_path / "out" / "tiny-s0" / "recipe.yaml").read_text())
    assert (saved["training"]["steps"], saved["logging"]["every"]) == (4, 2)
    (difference,) = result["differences"]
    assert difference["low"] <= difference["nats_per_token"] <= difference["high"]
    for name in ("comparison.md", "comparison.csv", "comparison.json", "comparison.png"):
        assert (tmp_path / "out" / name).is_file()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/summary.json")}
    assert json_of(tool(*asked))["rows"] == result["rows"]
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/summary.json")}


def test_a_cell_has_the_coherence_that_an_analysis_of_the_last_step_found(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    asked = ("analyze", "--run", tmp_path / "run", "--sweep-tokens", 0, "--json")
    (summary,) = json_of(tool(*asked, "--checkpoint", "latest"))["summary"]
    tool("compare", "--runs", tmp_path / "run", "--out", tmp_path / "out")
    cell = strictly((tmp_path / "out" / "cell-tiny-s0.json").read_text())
    found = cell["coherence"]
    assert found["share"] == summary["coherent"]
    assert found["untrained"] == summary["coherent_untrained"]
    assert found["text"] == "valid split" and found["tokens"] > 0


def test_compare_refuses_runs_on_different_text(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder / "run", other)
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps({**summary, "corpus_fingerprint": "f" * 64}))
    result = tool("compare", "--runs", folder / "run", other, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "different text" in result.stderr


BAD = {
    "unknown recipe": (["count_active_params", "--recipe", "sra-128"], "did you mean 'sra-128e'?"),
    "unknown key": (
        ["count_active_params", "model.channel.expert.hiden=3"],
        "unknown key model.channel.expert.hiden (did you mean 'hidden'?)",
    ),
    "no run": (["evaluate", "--run", "nowhere"], "nowhere is not a run directory"),
    "no run to generate": (["generate", "--run", "x", "--prompt", "a"], "not a run directory"),
    "no text": (["evaluate", "--run", "{run}", "--text", "nothing.txt"], "nothing.txt: no such file"),
    "no step": (["evaluate", "--run", "{run}", "--checkpoint", "99"], "steps kept: "),
    "stride": (["evaluate", "--run", "{run}", "--stride", "999"], "exceeds the window of 32"),
    "a folder that cannot be": (["prepare_data", "--out", "/proc/x"], "/proc/x"),
    "top-p": (["generate", "--run", "{run}", "--prompt", "a", "--top-p", "0"], "must be at least"),
    "seeds": (["compare", "--recipes", "quickstart", "--seeds", "a"], "expected numbers"),
    "no corpus": (["prepare_data", "data={source: text, train: [no.txt]}"], "no.txt: no such file"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_2(folder, arguments, says):
    result = tool(*(a.replace("{run}", str(folder / "run")) for a in arguments))
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert "error: " in last and says in last
    assert "Traceback" not in result.stderr


BAD_TRAINING = {
    "unknown key": (["training.stepz=3"], "did you mean 'steps'?"),
    "batch": (["training.micro_batch_size=3"], "not divisible"),
    "bf16 at stage 0": (["training.precision=bf16"], "master weights"),
    "resume with a recipe": (["--resume", "--run", "x"], "leave --recipe out"),
    "resume and init": (["--resume", "--init-from", "x"], "give one of them"),
    "init from nowhere": (["--init-from", "nowhere"], "not a run directory"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD_TRAINING.values(), ids=BAD_TRAINING.keys())
def test_bad_training_input_is_one_line_and_exit_2(folder, tmp_path, arguments, says):
    result = train("--recipe", folder / "tiny.yaml", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert says in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.glob("runs/*"))


def test_resuming_what_is_no_run_is_one_line_and_leaves_nothing(tmp_path):
    result = train("--resume", "--run", "nowhere", cwd=tmp_path)
    assert result.returncode == 2
    assert "nowhere is not a run directory" in result.stderr
    assert not list(tmp_path.iterdir())


def test_compare_refuses_two_runs_of_one_name_and_seed(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "other", symlinks=True)
    result = tool("compare", "--runs", folder / "run", tmp_path / "other", "--out", tmp_path / "o")
    assert result.returncode == 2
    assert "both tiny with seed 0" in result.stderr


def test_a_missing_deepspeed_file_is_named(folder):
    result = commands.call(
        BIN / "python", ROOT / "launch" / "train.py", "--deepspeed", "no.json",
        "--recipe", folder / "tiny.yaml",
    )  # fmt: skip
    assert result.returncode == 2 and "no.json: no such file" in result.stderr
