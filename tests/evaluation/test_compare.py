"""Comparisons of finished cells: what may be said, what is refused, what is trained again."""

import json
import signal
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import yaml

from commands import ROOT
from sra_ds.analysis.plots import draw_comparison
from sra_ds.config import load_recipe
from sra_ds.config.loading import validate
from sra_ds.errors import ConfigError, DataError, TrainingError
from sra_ds.evaluation.compare.budgets import Budget, apart, budget, require_matched
from sra_ds.evaluation.compare.cells import cells_of
from sra_ds.evaluation.compare.finished import (
    Coherence,
    FinishedCell,
    Health,
    Point,
    cell_file,
    read_cell,
    write_cell,
)
from sra_ds.evaluation.compare.settings import first_difference, portable
from sra_ds.evaluation.compare.tables import compare, markdown, write_tables
from sra_ds.evaluation.compare.training import Launch, _command, _environment, train_cells
from sra_ds.storage.run_dir import RunDir, refuse_overwriting

TOKENS = (30, 50, 20, 100)
RECIPE = """
schema_version: 1
name: tiny
data: {source: docstrings, tokenizer: {vocab_size: 300}}
model: {width: 16, layers: 1, mixer: {heads: 2}, channel: {kind: dense, feed_forward: {hidden: 16}}}
training: {steps: 1, batch_size: 1}
"""
STRIDE = portable(validate({**yaml.safe_load(RECIPE), "name": "a", "evaluation": {"stride": 16}}))
TRAINER = """
import json, os, sys, time
from pathlib import Path
import numpy, yaml
words = sys.argv[1:]
run = Path(words[words.index("--run") + 1])
recipe = yaml.safe_load(Path(words[words.index("--recipe") + 1]).read_text())
for word in words[words.index("--recipe") + 2:]:
    key, value = word.split("=")
    *path, last = key.split(".")
    part = recipe
    for name in path:
        part = part.setdefault(name, {})
    part[last] = yaml.safe_load(value)
(run / "evaluation").mkdir(parents=True)
(run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
(run / "environment.json").write_text(json.dumps({"world_size": 1}))
numpy.savez(run / "evaluation" / "valid_documents.npz", nll=[1.0, 2.0], tokens=[2, 3])
names = ("OMP_NUM_THREADS", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
(run / "seen.json").write_text(json.dumps({name: os.environ.get(name) for name in names}))
print("trained", run.name)
if recipe["training"]["seed"] == 13:
    sys.exit(3)
figures = ("token_perplexity", "word_perplexity", "bits_per_byte", "accuracy", "nll_per_token")
(run / "summary.json").write_text(json.dumps({
    "steps": 1, "validation": dict.fromkeys(figures, 2.0), "experts": None, "tokens": 8, "seconds": 1.0,
    "tokens_per_second": 8.0, "device": "cpu", "corpus_fingerprint": "f",
}))
"""


def cell(recipe: str, seed: int, nats: float = 5.0, **others: Any) -> FinishedCell:
    """A cell whose every token costs so many nats, and a little more in the second document."""
    nll = [nats * tokens + (number == 1) for number, tokens in enumerate(TOKENS)]
    per_token = sum(nll) / sum(TOKENS)
    values: dict[str, Any] = {
        "recipe": recipe,
        "seed": seed,
        "run": f"runs/{recipe}-{seed}",
        "settings": portable(validate({**yaml.safe_load(RECIPE), "name": recipe})),
        "token_perplexity": float(np.exp(per_token)),
        "word_perplexity": 900.0,
        "bits_per_byte": 1.5,
        "accuracy": 0.25,
        "nll_per_token": per_token,
        "document_nll": tuple(nll),
        "document_tokens": TOKENS,
        "curve": (),
        "experts": None,
        "coherence": None,
        "specialisation": None,
        "tokens": 1000,
        "seconds": 60.0,
        "tokens_per_second": 16.7,
        "peak_memory_bytes": None,
        "processes": 1,
        "device": "cpu",
        "budget": Budget(total=1000, active=500, flops=3000.0),
        "live_share": None,
        "corpus_fingerprint": "f",
    }
    return FinishedCell(**(values | others))


def cells(name: str, *nats: float, **others: Any) -> list[FinishedCell]:
    return [cell(name, seed, one, **others) for seed, one in enumerate(nats)]


def test_coherence_of_words_is_compared_on_one_text() -> None:
    one, other = (Coherence(share=0.25, untrained=0.2, text=text, tokens=9) for text in ("H", "I"))
    whole = [*cells("a", 5.0, 5.0, coherence=one), *cells("b", 5.0, 5.0)]
    row = compare(whole)["rows"][0]
    assert (row["coherent_mean"], row["coherent_untrained_mean"]) == (0.25, 0.2)
    assert "| 25% ± 0% | 20% ± 0% |" in markdown(compare(whole))
    with pytest.raises(ConfigError, match=r"analysed on different text: .*9 tokens, H"):
        compare([*whole, *cells("c", 5.0, coherence=other)])


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ((5.10, 5.12, 5.11), "worse by 11.6% of perplexity ["),
        ((4.90, 4.91, 4.89), "better by 9.5% of perplexity ["),
        ((4.80, 5.10, 5.06), "not told apart"),
        ((5.0, 5.0, 5.0), "not told apart"),
    ],
)
def test_words_are_said_where_the_interval_excludes_zero(theirs: Any, says: str) -> None:
    result = compare([*cells("a", 5.0, 5.0, 5.0), *cells("b", *theirs)])
    (found,) = result["differences"]
    assert (found["recipe"], found["against"], found["seeds"]) == ("b", "a", [0, 1, 2])
    assert found["verdict"].startswith(says)
    assert found["nats_per_token"] == pytest.approx(np.mean(theirs) - 5)
    assert found["perplexity_ratio"] == pytest.approx(np.exp(np.mean(theirs) - 5))
    assert (found["low"] > 0 or found["high"] < 0) == (says != "not told apart")
    assert f"* b against a: {says}" in markdown(result)


def test_an_interval_of_a_better_recipe_is_told_from_small_to_large() -> None:
    result = compare([*cells("a", 5.0, 5.0, 5.0), *cells("b", 4.90, 4.92, 4.88)])
    (found,) = result["differences"]
    small, large = 1 - np.exp(found["high"]), 1 - np.exp(found["low"])
    assert f"[{small:.1%}, {large:.1%}]" in found["verdict"]


def test_nothing_is_said_of_one_seed_or_of_seeds_that_are_not_common() -> None:
    one = compare([*cells("a", 5.0), *cells("b", 6.0)])["differences"][0]
    assert one["verdict"] == "one seed, which says nothing of the recipes"
    assert one["nats_per_token"] == pytest.approx(1.0)
    result = compare([cell("a", 0), cell("b", 1)])
    assert result["differences"][0]["verdict"] == "no common seed"
    assert "b against a: no common seed" in markdown(result)


def test_only_common_seeds_are_paired() -> None:
    found = compare([*cells("a", 5.0, 5.0, 9.0), *cells("b", 5.1, 5.1)])["differences"][0]
    assert found["seeds"] == [0, 1]
    assert found["nats_per_token"] == pytest.approx(0.1)


def test_the_reference_is_the_first_or_the_one_named() -> None:
    all_of_them = [*cells("a", 5.0, 5.1), *cells("b", 5.0, 5.2), *cells("c", 5.0, 5.3)]
    pairs = [(d["recipe"], d["against"]) for d in compare(all_of_them, "b")["differences"]]
    assert pairs == [("a", "b"), ("c", "b")]
    with pytest.raises(ConfigError, match="--against d: compared are a, b, c"):
        compare(all_of_them, "d")


@pytest.mark.parametrize(
    ("others", "error", "says"),
    [
        ({"corpus_fingerprint": "g"}, DataError, "trained on different text"),
        ({"tokens": 2000}, ConfigError, "saw different numbers of tokens"),
        ({"recipe": "a", "run": "elsewhere"}, ConfigError, "are both a with seed 0"),
        ({"document_tokens": (30, 50, 20, 99)}, DataError, "scored on different documents"),
        ({"settings": STRIDE}, ConfigError, "evaluation.stride differs"),
        (
            {"recipe": "a", "seed": 1, "settings": STRIDE},
            ConfigError,
            "both a, but evaluation.stride",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(others: Any, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        compare([cell("a", 0), cell("b", 0).model_copy(update=others)])


def test_budgets_are_said_and_refused_where_they_should_match() -> None:
    wide = Budget(total=2000, active=505, flops=3300.0)
    both = [cell("a", 0), cell("b", 0, budget=wide)]
    result = compare(both, matched=["active"])
    assert result["apart"] == pytest.approx({"total": 0.5, "active": 5 / 505, "flops": 1 / 11})
    assert "50.0% in parameters, 1.0% in active ones and 9.1% in operations" in markdown(result)
    with pytest.raises(ConfigError, match=r"--matched flops: 9\.1% apart, allowed are 2%"):
        compare(both, matched=["active", "flops"])


def test_dense_twins_are_matched_in_active_parameters_and_not_in_all() -> None:
    budgets = {name: budget(load_recipe(name))[0] for name in ("quickstart", "quickstart-dense")}
    require_matched(budgets, ["active"])
    assert apart(list(budgets.values()))["total"] > 0.8
    with pytest.raises(ConfigError, match="--matched total"):
        require_matched(budgets, ["total"])


def test_operations_are_the_mean_over_the_schedule_of_k() -> None:
    own = load_recipe("sra-small", ["training.top_k_schedule=[[0, 1], [0.25, 2]]"])
    one, two = (
        budget(
            load_recipe("sra-small", ["training.top_k_schedule=[]", f"model.channel.top_k={k}"])
        )[0]
        for k in (1, 2)
    )
    mean = 0.25 * one.flops + 0.75 * two.flops
    assert budget(own)[0].flops == pytest.approx(mean) and one.flops < two.flops
    assert budget(own)[0].active == two.active


def test_tables_are_made_again_from_the_cells_alone(tmp_path: Path) -> None:
    health = Health(dead_fraction=0.25, load_cv=0.5, max_violation=1.5)
    own = [
        *cells("a", 5.0, 5.1, experts=health),
        *cells("b", 5.2, 5.2, peak_memory_bytes=3 * 10**9),
    ]
    result = compare(own)
    write_tables(result, own, draw_comparison, tmp_path)
    for name in ("comparison.md", "comparison.csv", "comparison.json", "comparison.png"):
        assert (tmp_path / name).is_file()
    assert compare([read_cell(cell_file(tmp_path, one.name)) for one in own]) == result
    text = (tmp_path / "comparison.md").read_text()
    assert "| 25.0% ± 0.0% | 0.50 ± 0.00 |" in text and "| 3.00 ± 0.00 |" in text


def test_progress_is_the_mean_over_seeds() -> None:
    def curve(first: float, last: float) -> tuple[Point, ...]:
        return tuple(
            Point(step=step, epoch=0.5, token_perplexity=p, legacy_sra_perplexity=legacy)
            for step, p, legacy in ((10, first, None), (20, last, last / 2))
        )  # fmt: skip

    both = [cell("a", 0, curve=curve(200.0, 100.0)), cell("a", 1, curve=curve(300.0, 120.0))]
    result = compare(both)
    assert [point["token_perplexity"] for point in result["progress"]] == [250.0, 110.0]
    assert [point["legacy_sra_perplexity"] for point in result["progress"]] == [None, 55.0]
    assert "| a | 20 | 0.50 | 110.00 | 55.00 |\n" in markdown(result), "no column without a value"


def test_what_is_no_cell_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cell-a-s0.json"
    path.write_text(json.dumps({"recipe": "a"}))
    with pytest.raises(DataError, match=r"cell-a-s0.json: not a finished cell \(seed: Field"):
        read_cell(path)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Starts a script that leaves what a run leaves; seed 13 fails."""
    script = tmp_path / "train.py"
    script.write_text(dedent(TRAINER))
    return Launch(script, Path("ds.json"))


def test_finished_cells_are_not_trained_again(
    recipe: str, launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, runs = tmp_path / "out", tmp_path / "runs"
    first = train_cells(cells_of([recipe], [], [0]), launch, out, runs)
    assert capfd.readouterr().err.count("trained") == 1
    assert [one.document_nll for one in first] == [(1.0, 2.0)]
    (runs / "tiny-s0").rename(tmp_path / "gone")  # the cell's file is enough
    again = train_cells(cells_of([recipe], [], [0, 1]), launch, out, runs)
    assert [one.name for one in again] == ["tiny-s0", "tiny-s1"]
    assert capfd.readouterr().err.count("trained") == 1
    cell_file(out, "tiny-s1").unlink()  # so is its run
    train_cells(cells_of([recipe], [], [0, 1]), launch, out, runs)
    assert "trained" not in capfd.readouterr().err and cell_file(out, "tiny-s1").is_file()


def test_other_settings_under_the_same_name_are_refused(
    recipe: str, launch: Launch, tmp_path: Path
) -> None:
    train_cells(cells_of([recipe], [], [0]), launch, tmp_path / "out", tmp_path / "runs")
    for out in ("out", "new"):  # known by the cell, and by the run
        with pytest.raises(ConfigError, match="is of other settings"):
            other = cells_of([recipe], ["training.steps=2"], [0])
            train_cells(other, launch, tmp_path / out, tmp_path / "runs")
    with pytest.raises(ConfigError, match="two cells are called tiny-s0"):
        train_cells(cells_of([recipe, recipe], [], [0]), launch, tmp_path / "o", tmp_path / "r")


def test_unmatched_recipes_are_refused_before_anything_is_trained(
    recipe: str, launch: Launch, tmp_path: Path
) -> None:
    wide = tmp_path / "wide.yaml"
    wide.write_text(RECIPE.replace("tiny", "wide").replace("width: 16", "width: 32"))
    with pytest.raises(ConfigError, match="--matched active"):
        asked = cells_of([recipe, str(wide)], [], [0])
        train_cells(asked, launch, tmp_path / "out", tmp_path / "runs", ["active"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_cell_stops_the_others_and_keeps_what_is_finished(
    recipe: str, launch: Launch, tmp_path: Path, jobs: int
) -> None:
    asked = cells_of([recipe], [], [0, 13, 1, 2, 3])
    with pytest.raises(TrainingError, match=r"tiny-s13 did not finish \(exit 3\)"):
        train_cells(asked, launch._replace(jobs=jobs), tmp_path / "out", tmp_path / "runs")
    assert cell_file(tmp_path / "out", "tiny-s0").is_file()
    assert not (tmp_path / "runs" / f"tiny-s{3 - (jobs == 1) * 2}").exists()


def test_jobs_share_the_machine_and_speak_into_files(
    recipe: str, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    runs = tmp_path / "runs"
    asked = cells_of([recipe], [], [0, 1, 2])
    train_cells(asked, launch._replace(jobs=3), tmp_path / "out", runs)
    for seed in range(3):
        seen = json.loads((runs / f"tiny-s{seed}" / "seen.json").read_text())
        assert (seen["OMP_NUM_THREADS"], seen["MASTER_PORT"]) == ("2", None)
        assert (runs / f"tiny-s{seed}.log").read_text() == f"trained tiny-s{seed}\n"


def test_processes_of_one_run_share_the_machine(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun gives each one thread where it is told nothing."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert _environment(launch._replace(processes=2), 0)["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS" not in _environment(launch, 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _environment(launch._replace(processes=2), 0)["OMP_NUM_THREADS"] == "3"


def test_jobs_take_gpus_of_their_own(
    recipe: str, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    asked = cells_of([recipe], [], [0, 1])
    train_cells(asked, launch._replace(jobs=2), tmp_path / "out", tmp_path / "runs")
    seen = {(tmp_path / "runs" / f"tiny-s{seed}" / "seen.json").read_text() for seed in (0, 1)}
    assert {json.loads(text)["CUDA_VISIBLE_DEVICES"] for text in seen} == {"5", "7"}
    with pytest.raises(ConfigError, match="are 4 GPUs, and there are 2"):
        many = launch._replace(jobs=2, processes=2)
        train_cells(asked, many, tmp_path / "out", tmp_path / "runs")


def test_several_processes_are_started_by_torchrun(recipe: str, launch: Launch) -> None:
    (own,) = cells_of([recipe], [], [0])
    command = _command(own, RunDir(Path("r")), launch._replace(processes=2))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert command[:8] == [*start, "--nproc-per-node", "2", "--", str(launch.script)]


def test_a_run_goes_on_from_a_checkpoint_and_not_from_its_best_weights(
    recipe: str, launch: Launch, tmp_path: Path
) -> None:
    (own,) = cells_of([recipe], [], [0])
    run = RunDir(tmp_path / "r")
    for name, resumes in (("best-5", False), ("4", True)):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "manifest.json").touch()
        assert ("--resume" in _command(own, run, launch)) == resumes
        if not resumes:
            refuse_overwriting(run)
    with pytest.raises(ConfigError, match="already holds a run"):
        refuse_overwriting(run)


def test_an_infinite_perplexity_is_kept(tmp_path: Path) -> None:
    own = cell("a", 0, token_perplexity=float("inf"))
    write_cell(own, tmp_path)
    assert read_cell(cell_file(tmp_path, own.name)) == own


@pytest.mark.parametrize("folder", ["sra", "sra-best", "moe-family", "spectral"])
def test_committed_cells_make_their_tables_again(folder: str) -> None:
    here = ROOT / "docs" / "results" / folder
    known = json.loads((here / "comparison.json").read_text())
    order = [row["recipe"] for row in known["rows"]]
    own = [read_cell(path) for path in sorted(here.glob("cell-*.json"))]
    own.sort(key=lambda one: (one.seed, order.index(one.recipe)))
    result = json.loads(json.dumps(compare(own)))
    assert result["rows"] == known["rows"] and result["differences"] == known["differences"]
    assert markdown(result) == (here / "comparison.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_runs_are_told_to_stop_and_none_begins_after(
    recipe: str, launch: Launch, tmp_path: Path, number: int
) -> None:
    launch.script.write_text(
        "import os, signal, sys, time\n"
        "os.makedirs(sys.argv[sys.argv.index('--run') + 1])\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        f"os.kill(os.getppid(), {int(number)})\n"
        "time.sleep(60)\n"
    )
    before = signal.getsignal(number)
    with pytest.raises(TrainingError, match="stopped with 0 of 2 cells; the same command goes on"):
        asked = cells_of([recipe], [], [0, 1])
        train_cells(asked, launch, tmp_path / "out", tmp_path / "runs")
    assert signal.getsignal(number) == before
    assert not (tmp_path / "runs" / "tiny-s1").exists()


def test_a_cell_keeps_the_settings_of_its_run(recipe: str, launch: Launch, tmp_path: Path) -> None:
    asked = ["data.directory=there/prepared", "data.tokenizer.file=there/tokenizer.json"]
    (own,) = train_cells(
        cells_of([recipe], asked, [4]), launch, tmp_path / "out", tmp_path / "runs"
    )
    assert own.settings["data"]["directory"] == "prepared"
    assert "there" not in own.model_dump_json(exclude={"run"})
    write_cell(own, tmp_path)
    known = read_cell(cell_file(tmp_path, own.name)).settings
    elsewhere = ["data.directory=/x/prepared", "data.tokenizer.file=tokenizer.json"]
    same, other = (
        portable(load_recipe(recipe, [*elsewhere, f"training.seed={seed}"])) for seed in (4, 5)
    )
    assert first_difference(known, same) is None
    assert first_difference(known, other) == "training.seed: 4 there, 5 here"
    assert first_difference(known, other, ["training.seed"]) is None
    older = {**known, "model": {k: v for k, v in known["model"].items() if k != "memory"}}
    assert first_difference(older, same) is None, "what came later has its default"
