"""Whole runs of the Semantic Resonance LM's and of SpectralLLM's parts with the real command, interrupted
and resumed.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from commands import interrupt, step_lines, train
from sra_ds.model.mixers.filters import orthogonality_error

PARTS = {
    "resonance": (
        "model.embedding={kind: prime_hilbert, table_width: 16, primes: [3, 5], dropout: 0.0}",
        "model.mixer={kind: resonance, heads: 2, threshold: 0.7}",
        "model.memory={kind: persistent, heads: 2, head_width: 8}",
        "model.head={kind: pre_manifest, candidates: 8, deep_supervision: true}",
        "training.top_k_schedule=[[0,1],[0.5,2]]",
        "training.batching=documents",
        "training.micro_batch_size=4",
    ),
    "spectral": (
        "model.embedding={kind: hybrid, harmonics: 6, ramp: 0.75, dropout: 0.0}",
        "model.mixer={kind: wavelet, heads: 8, families: [haar, db2], dropout: 0.0}",
        "model.channel={kind: dense, feed_forward: {kind: gelu, hidden: 32, dropout: 0.0}}",
        "losses={balance: none, dispersion: none, z_weight: 0.0}",
    ),
}
TOLD = {"loss", "cross_entropy", "auxiliary", "halting", "facts", "step", "tokens"}
"""What a line of metrics has in common with the same step of any run."""


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Callable[[str], Path]:
    """A finished run of these parts, trained once."""
    done: dict[str, Path] = {}

    def run_of(name: str) -> Path:
        if name not in done:
            run = tmp_path_factory.mktemp(name) / "run"
            result = train("--recipe", tiny / "tiny.yaml", "--run", run, *PARTS[name], stage=2)
            assert result.returncode == 0, result.stderr
            done[name] = run
        return done[name]

    return run_of


def test_resonance_learns_and_tells_how_it_iterates(whole) -> None:
    run = whole("resonance")
    lines = step_lines(run)
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
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens"] == tokens[-1]
    figures = {path.name for path in (run / "figures").iterdir()}
    assert {
        "entropy_over_steps.png",
        "entropy_by_iteration.png",
        "iterations.png",
        "memory.png",
    } <= figures


def test_waves_learn_and_tell_of_themselves(whole) -> None:
    lines = step_lines(whole("spectral"))
    assert lines[-1]["cross_entropy"] < lines[0]["cross_entropy"] - 0.2
    ratios = [line["facts"]["embedding/ratio"] for line in lines]
    assert ratios[0] == 0 and ratios[3] == pytest.approx(0.5 * 3 / 9, abs=1e-6)
    assert ratios[9] == pytest.approx(0.5, abs=1e-6) and ratios[11] != ratios[9]
    for layer in range(2):
        own = {n: v for n, v in lines[-1]["facts"].items() if n.startswith(f"layer{layer}/")}
        shares = [v for n, v in own.items() if "energy_" in n]
        assert len(shares) == 4 and sum(shares) == pytest.approx(1)
        chances = [own[f"layer{layer}/choice_{family}"] for family in ("haar", "db2")]
        assert sum(chances) == pytest.approx(1) and chances[0] != 0.5
    figures = {path.name for path in (whole("spectral") / "figures").iterdir()}
    assert {"spectrum.png", "effective_rank.png", "hybrid_ratio.png", "bands.png"} <= figures


@pytest.mark.parametrize("name", PARTS)
def test_resumed_in_the_middle_it_is_the_same_run(whole, tmp_path, name: str) -> None:
    """Within the ramp of the waves' share; draws among families go on where they were."""
    run, uninterrupted = tmp_path / "interrupted", whole(name)
    interrupt(uninterrupted, run, at=8, end=12)
    result = train("--resume", "--run", run, stage=2)
    assert result.returncode == 0, result.stderr
    for mine, theirs in zip(step_lines(run), step_lines(uninterrupted), strict=True):
        assert mine.keys() == theirs.keys()
        for key in TOLD & theirs.keys():
            assert mine[key] == theirs[key], key
    ours, theirs = (weights_of(folder) for folder in (run, uninterrupted))
    assert all((ours[part] == theirs[part]).all() for part in theirs)


def test_controllers_left_their_marks(whole) -> None:
    resonance, spectral = (weights_of(whole(name)) for name in PARTS)
    written = [value for part, value in resonance.items() if part.endswith("start_state_HCC")]
    assert len(written) == 2 and all(state.abs().max() > 0 for state in written)
    assert float(spectral["embedding.ramp"]) == 1.0
    temperatures = [v for part, v in spectral.items() if part.endswith("low_pass.temperature")]
    assert [float(t) for t in temperatures] == [pytest.approx(1 - 0.7 * 11 / 12)] * 2


def test_learned_filters_are_held_and_drawn(tiny, tmp_path) -> None:
    mixer = "model.mixer={kind: wavelet, form: wave_conv, families: [db2], filters: learnable}"
    embedding, _, *others = PARTS["spectral"]
    errors = {}
    for weight in (0, 10):
        run = tmp_path / f"weight-{weight}"
        asked = (embedding, mixer, *others, f"losses.wavelet_weight={weight}")
        result = train("--recipe", tiny / "tiny.yaml", "--run", run, *asked)
        assert result.returncode == 0, result.stderr
        assert step_lines(run)[-1]["facts"]["layer0/filter_drift"] > 0
        assert (run / "figures" / "filter_drift.png").is_file()
        weights = load_file(run / "checkpoints" / "12" / "model.safetensors")
        taps = [value for name, value in weights.items() if name.endswith("low_pass.learned_K")]
        errors[weight] = sum(float(orthogonality_error(own / own.sum())) for own in taps)
    assert errors[10] < errors[0] / 2


def weights_of(run: Path) -> dict:
    return load_file(run / "checkpoints" / "12" / "model.safetensors")
