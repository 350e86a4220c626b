"""Every file of ds_configs/ starts an engine, and all train alike."""

import pytest

from commands import ROOT
from distributed import config_of, engine_step, open_engine, recipe_of, run_ranks

SHIPPED = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
STEPS = 3


def steps_of_all() -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of a few steps on experts spread over two processes, by configuration."""
    found = {}
    recipe = recipe_of(2)
    for name in SHIPPED:
        engine = open_engine(recipe, config_of(0, name))
        if name.startswith("zero3"):  # before a forward pass could find out
            registered = engine.module.head._external_params.values()
            assert any(p is engine.module.embedding.weight for p in registered)
        found[name] = [engine_step(engine, recipe, number) for number in range(STEPS)]
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def steps():
    return run_ranks(2, steps_of_all)[0]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_configuration_trains_like_stage_0(steps, name):
    for (loss, norm), (expected, expected_norm) in zip(
        steps[name], steps["zero0.json"], strict=True
    ):
        assert loss == pytest.approx(expected, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    assert steps[name][-1][0] < steps[name][0][0]
