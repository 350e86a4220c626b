"""A whole run of SpectralLLM's parts with the real command, interrupted and resumed."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from commands import interrupt, step_lines, train
from sra_ds.model.mixers.filters import orthogonality_error

PARTS = (
    "model.embedding={kind: hybrid, harmonics: 6, ramp: 0.75, dropout: 0.0}",
    "model.mixer={kind: wavelet, heads: 8, families: [haar, db2], dropout: 0.0}",
    "model.channel={kind: dense, feed_forward: {kind: gelu, hidden: 32, dropout: 0.0}}",
    "losses={balance: none, dispersion: none, z_weight: 0.0}",
)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("spectral") / "run"
    result = train("--recipe", tiny / "tiny.yaml", "--run", run, *PARTS, stage=2)
    assert result.returncode == 0, result.stderr
    return run


def test_it_learns_and_tells_of_its_waves(whole) -> None:
    lines = step_lines(whole)
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
    figures = {path.name for path in (whole / "figures").iterdir()}
    assert {"spectrum.png", "effective_rank.png", "hybrid_ratio.png", "bands.png"} <= figures


def test_resumed_within_the_ramp_it_is_the_same_run(whole, tmp_path) -> None:
    """The draws among families go on where they were."""
    run = tmp_path / "interrupted"
    interrupt(whole, run, at=8, end=12)
    result = train("--resume", "--run", run, stage=2)
    assert result.returncode == 0, result.stderr
    for mine, theirs in zip(step_lines(run), step_lines(whole), strict=True):
        same = ("step", "tokens", "loss", "cross_entropy", "facts")
        assert [mine[key] for key in same] == [theirs[key] for key in same]
    ours, theirs = (load_file(r / "checkpoints" / "12" / "model.safetensors") for r in (run, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert float(theirs["embedding.ramp"]) == 1.0
    temperatures = [
        value for name, value in theirs.items() if name.endswith("low_pass.temperature")
    ]
    assert [float(t) for t in temperatures] == [pytest.approx(1 - 0.7 * 11 / 12)] * 2


def test_learned_filters_are_held_and_drawn(tiny, tmp_path) -> None:
    mixer = "model.mixer={kind: wavelet, form: wave_conv, families: [db2], filters: learnable}"
    errors = {}
    for weight in (0, 10):
        run = tmp_path / f"weight-{weight}"
        asked = (PARTS[0], mixer, *PARTS[2:], f"losses.wavelet_weight={weight}")
        result = train("--recipe", tiny / "tiny.yaml", "--run", run, *asked)
        assert result.returncode == 0, result.stderr
        assert step_lines(run)[-1]["facts"]["layer0/filter_drift"] > 0
        assert (run / "figures" / "filter_drift.png").is_file()
        weights = load_file(run / "checkpoints" / "12" / "model.safetensors")
        taps = [value for name, value in weights.items() if name.endswith("low_pass.learned_K")]
        errors[weight] = sum(float(orthogonality_error(own / own.sum())) for own in taps)
    assert errors[10] < errors[0] / 2
