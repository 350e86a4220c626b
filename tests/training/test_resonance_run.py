"""A whole run of the Semantic Resonance LM's parts with the real command, interrupted and resumed."""

import itertools
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from commands import interrupt, step_lines, train

PARTS = (
    "model.embedding={kind: prime_hilbert, table_width: 16, primes: [3, 5], dropout: 0.0}",
    "model.mixer={kind: resonance, heads: 2, threshold: 0.7}",
    "model.memory={kind: persistent, heads: 2, head_width: 8}",
    "model.head={kind: pre_manifest, candidates: 8, deep_supervision: true}",
    "training.top_k_schedule=[[0,1],[0.5,2]]",
    "training.batching=documents",
    "training.micro_batch_size=4",
)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("resonance") / "run"
    result = train("--recipe", tiny / "tiny.yaml", "--run", run, *PARTS, stage=2)
    assert result.returncode == 0, result.stderr
    return run


def test_it_learns_and_tells_how_it_iterates(whole) -> None:
    lines = step_lines(whole)
    assert lines[-1]["cross_entropy"] < lines[0]["cross_entropy"] - 0.2
    assert set(lines[-1]["auxiliary"]) == {
        "balance",
        "dispersion",
        "z",
        "ponder",
        "supervision",
    }
    assert len(lines[-1]["halting"]) == 2
    for layer in lines[-1]["halting"]:
        assert 1 <= layer["iterations"] <= 3 and len(layer["entropy"]) == 3
    tokens = [line["tokens"] for line in lines]
    steps = {b - a for a, b in itertools.pairwise(tokens)}
    assert len(steps) > 1 and max(steps) <= 8 * 32  # documents do not fill every budget
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["tokens"] == tokens[-1]
    figures = {path.name for path in (whole / "figures").iterdir()}
    assert {
        "entropy_over_steps.png",
        "entropy_by_iteration.png",
        "iterations.png",
        "memory.png",
    } <= figures


def test_resumed_in_the_middle_it_is_the_same_run(whole, tmp_path) -> None:
    run = tmp_path / "interrupted"
    interrupt(whole, run, at=8, end=12)
    result = train("--resume", "--run", run, stage=2)
    assert result.returncode == 0, result.stderr
    for mine, theirs in zip(step_lines(run), step_lines(whole), strict=True):
        same = ("step", "tokens", "loss", "cross_entropy", "auxiliary", "halting", "facts")
        assert [mine[key] for key in same] == [theirs[key] for key in same]
    ours, theirs = (load_file(r / "checkpoints" / "12" / "model.safetensors") for r in (run, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    written = [theirs[name] for name in theirs if name.endswith("start_state_HCC")]
    assert len(written) == 2 and all(state.abs().max() > 0 for state in written)
