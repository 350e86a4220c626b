"""`model.moe.mode` and the recipes of its family."""

from pathlib import Path

import pytest

from sra_ds.config import dump_recipe, load_recipe
from sra_ds.config.loading import MODES
from sra_ds.config.model import GraphCouplingConfig, HypergraphCouplingConfig, MoEChannelConfig
from sra_ds.errors import ConfigError
from sra_ds.model.counting import count_parameters
from sra_ds.model.language_model import build_model

FAMILY = ("gnn-moe", "hgnn-moe", "orthogonal-moe", "ghost-moe", "ghost-moe-control")


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_stands_for_its_keys_and_those_before(mode: str) -> None:
    recipe = load_recipe("quickstart", [f"model.moe.mode={mode}"])
    channel = recipe.model.channel
    assert isinstance(channel, MoEChannelConfig)
    coupling = GraphCouplingConfig if mode == "gnn" else HypergraphCouplingConfig
    assert isinstance(channel.coupling, coupling)
    late = MODES.index(mode)
    assert channel.compare_outputs == (late >= 2)
    assert (recipe.training.specialisation is not None) == (late >= 2)
    assert (channel.ghosts.count > 0) == (recipe.training.ghosts is not None) == (late == 3)
    assert "moe:" not in dump_recipe(recipe).replace("kind: moe", "")


def test_own_keys_win_over_those_of_the_mode(tmp_path: Path) -> None:
    overrides = ["model.channel.ghosts.count=0", "model.moe.mode=orthogonal"]
    overrides += ["training.specialisation.target=0.5"]
    recipe = load_recipe("quickstart", overrides)
    assert recipe.training.specialisation is not None
    assert recipe.training.specialisation.target == 0.5
    file = tmp_path / "own.yaml"
    file.write_text(
        "extends: quickstart\nmodel: {moe: {mode: ghost}, channel: {ghosts: {count: 3}}}"
    )
    assert load_recipe(str(file)).model.channel.ghosts.count == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "override, said",
    [
        ("model.moe.mode=ghosts", "no mode 'ghosts' .did you mean 'ghost'"),
        ("model.moe.mode=3", "no mode 3"),
        ("model.moe.modes=gnn", "only `mode` is known"),
        ("model.moe=gnn", "only `mode` is known"),
    ],
)
def test_a_wrong_mode_names_those_there_are(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        load_recipe("quickstart", [override])
    assert "gnn, hgnn, orthogonal, ghost" in str(raised.value)


def test_a_dense_recipe_has_no_mode() -> None:
    with pytest.raises(ConfigError, match=r"unknown key model\.channel\."):
        load_recipe("quickstart-dense", ["model.moe.mode=gnn"])


@pytest.mark.parametrize("name", FAMILY)
def test_the_recipes_have_equal_active_parameters(name: str) -> None:
    counts = [count_parameters(build_model(load_recipe(n), "meta")) for n in (name, "moe-small")]
    assert abs(counts[0]["active"] / counts[1]["active"] - 1) < 0.002
    if name.startswith("ghost"):
        twin = count_parameters(build_model(load_recipe("ghost-moe-control"), "meta"))
        assert abs(counts[0]["total"] / twin["total"] - 1) < 1e-4
