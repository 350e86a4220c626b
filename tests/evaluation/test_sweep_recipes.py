"""Sweeps: variants of a recipe under names of their own, and figures of what they differ in."""

from pathlib import Path

import pytest

from sra_ds.analysis.plots import draw_comparison
from sra_ds.config import load_recipe
from sra_ds.errors import ConfigError
from sra_ds.evaluation.compare.budgets import budget
from sra_ds.evaluation.compare.cells import read_sweep
from sra_ds.inference.load import load_run
from sra_ds.model.flops import flops_per_token
from sra_ds.model.language_model import build_model
from sra_ds.workflow.report import draw_figures


def test_the_shipped_sweep_varies_thresholds_iterations_and_primes() -> None:
    cells = read_sweep("resonance", ["training.steps=3"], [0])
    recipes = [cell.recipe for cell in cells]
    assert [f"{recipe.name}-s0" for recipe in recipes] == [cell.name for cell in cells]
    assert len({recipe.name for recipe in recipes}) == len(recipes)
    assert {recipe.training.steps for recipe in recipes} == {3}
    assert len({recipe.model.mixer.threshold for recipe in recipes}) == 4
    assert {recipe.model.mixer.iterations for recipe in recipes} == {1, 2, 3, 5}
    assert len({recipe.model.channel.primes for recipe in recipes}) == 5


@pytest.mark.parametrize(
    "text", ["- a list", "recipe: quickstart", "recipe: a\nvariants: 3", "{", "variants: {a: []}"]
)
def test_what_is_no_sweep_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="a sweep has"):
        read_sweep(str(file), [], [0])


def test_an_unknown_sweep_is_refused() -> None:
    with pytest.raises(ConfigError, match="no sweep 'nothing': shipped are resonance, sra"):
        read_sweep("nothing", [], [0])


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("recipe: quickstart\nvariants:\n  wide: [model.width=256]\n  plain: []\n")
    wide, plain = read_sweep(str(file), [], [0])
    assert wide.recipe.model.width == 256
    assert read_sweep(str(file), ["model.width=128"], [0])[0].recipe.model.width == 256
    assert plain.recipe.name == "plain"


@pytest.mark.parametrize("twin", ["dense", "random", "once"])
def test_twins_of_the_proof_of_concept_cost_as_many_flops(twin: str) -> None:
    recipes = [load_recipe("resonance-8m"), load_recipe(f"resonance-8m-{twin}")]
    own, other = (flops_per_token(build_model(recipe, "meta"), 256) for recipe in recipes)
    assert other == pytest.approx(own, rel=1e-3)
    assert recipes[0].training == recipes[1].training and recipes[0].data == recipes[1].data


def row(name: str, share: float | None) -> dict:
    return {
        "recipe": name,
        "live_share": share,
        "token_perplexity_mean": 10.0,
        "token_perplexity_sd": 1.0,
        "token_perplexities": [9.0, 11.0],
    }


def test_masks_of_a_run_are_drawn(make_run, tmp_path: Path) -> None:
    for family, drawn in (("resonance", True), ("resonance-blocks", True), ("dense", False)):
        run = make_run(family, name=family)
        draw_figures(load_run(run.path), run)
        assert (run.figures / "mask.png").exists() == drawn


def test_a_figure_of_compression_where_shares_differ(tmp_path: Path) -> None:
    draw_comparison([row("a", 0.3), row("b", None), row("c", 0.3)], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"comparison.png"}
    draw_comparison([row("a", 0.3), row("b", None), row("c", 0.5)], tmp_path)
    assert (tmp_path / "compression.png").stat().st_size > 1000


@pytest.mark.parametrize("sweep", ["sra", "sra-best", "sra-best-combined", "sra-best-twins"])
def test_variants_of_sra_have_the_active_parameters_of_its_dense_twin(sweep: str) -> None:
    twin = budget(load_recipe("dense-small"))[0].active
    for cell in read_sweep(sweep, [], [0]):
        expected = 1.4 if cell.recipe.name == "k-1-4" else 1
        assert budget(cell.recipe)[0].active == pytest.approx(expected * twin, rel=3e-3), cell.name


def test_twins_of_sra_best_have_the_published_channels_and_losses() -> None:
    twins = {cell.recipe.name: cell.recipe for cell in read_sweep("sra-best-twins", [], [0])}
    best = twins["sra-best"].training
    for version in ("v1", "v2"):
        twin, published = twins[f"sra-best-{version}"], load_recipe(f"sra-{version}-small")
        assert (twin.model, twin.losses) == (published.model, published.losses)
        assert twin.training.top_k_schedule == published.training.top_k_schedule
        assert (twin.training.schedule, twin.training.optimizer) == (best.schedule, best.optimizer)
        assert twin.training.batch_size == best.batch_size


def test_the_published_forms_have_the_parameters_of_sra_small() -> None:
    own, *others = (
        budget(load_recipe(name))[0] for name in ("sra-small", "sra-v1-small", "sra-v2-small")
    )
    for other in others:
        assert other.active == pytest.approx(own.active, rel=2e-3)
        assert other.total == pytest.approx(own.total, rel=2e-3)
