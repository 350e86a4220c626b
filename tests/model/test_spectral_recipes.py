"""The shipped recipes of the spectral family: their sizes, and twins of equal size."""

import pytest

from sra_ds.config import load_recipe
from sra_ds.model.counting import count_parameters
from sra_ds.model.language_model import build_model

SIZES = {"8m": 7.88e6, "18m": 17.73e6, "40m": 39.39e6}
OTHERS = {
    "8m": ("token", "conv", "plain-conv", "waves", "factorised"),
    "18m": ("token",),
    "40m": ("token",),
}
PAIRS = [(size, other) for size, others in OTHERS.items() for other in others]


def total(name: str) -> int:
    return int(count_parameters(build_model(load_recipe(name), "meta"))["total"])


@pytest.mark.parametrize("size", SIZES)
def test_they_have_the_size_of_their_name(size: str) -> None:
    assert total(f"spectral-{size}") == pytest.approx(SIZES[size], rel=1e-3)


@pytest.mark.parametrize(("size", "other"), PAIRS)
def test_twins_and_controls_have_equal_parameters(size: str, other: str) -> None:
    own, theirs = total(f"spectral-{size}"), total(f"spectral-{size}-{other}")
    assert theirs == pytest.approx(own, rel=0.002)


def test_controls_differ_in_the_one_thing_they_control() -> None:
    recipe, plain = load_recipe("spectral-8m-conv"), load_recipe("spectral-8m-plain-conv")
    assert recipe.model.mixer.receptive_field == plain.model.mixer.taps
    assert recipe.model.embedding == plain.model.embedding
    waves, table = load_recipe("spectral-8m-waves"), load_recipe("spectral-8m-factorised")
    assert 2 * waves.model.embedding.harmonics == table.model.embedding.rank
    assert waves.model.mixer == table.model.mixer
    for name in OTHERS["8m"]:
        own = load_recipe(f"spectral-8m-{name}")
        assert (own.training, own.data) == (recipe.training, recipe.data)
