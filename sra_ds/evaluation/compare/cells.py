"""What a comparison trains: recipes with overrides and seeds, each under a name of its own."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import yaml

from sra_ds.config import Recipe, load_recipe
from sra_ds.errors import ConfigError


class Cell(NamedTuple):
    """One run to be made: the words that ask for it, and the recipe they stand for."""

    source: str
    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def name(self) -> str:
        """What its files are called."""
        return name_of(self.recipe.name, self.recipe.training.seed)


def name_of(recipe: str, seed: int) -> str:
    """What the files of a cell are called."""
    return f"{recipe}-s{seed}"


def cells_of(recipes: Sequence[str], overrides: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All recipes with the first seed, then with the next. Raises `ConfigError`."""
    return [_cell(recipe, overrides, seed) for seed in seeds for recipe in recipes]


def read_sweep(name_or_file: str, overrides: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """The variants of a sweep: a YAML file, or one shipped as `sra_ds/recipes/sweeps/NAME.yaml`, with a
    `recipe` and `variants`, each a name and its overrides, which win over the common ones. Raises
    `ConfigError`."""
    path, shipped = Path(name_or_file), Path(str(resources.files("sra_ds") / "recipes" / "sweeps"))
    if path.suffix not in (".yaml", ".yml"):
        path = shipped / f"{name_or_file}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(found.stem for found in shipped.glob("*.yaml")))
        raise ConfigError(f"no sweep {name_or_file!r}: shipped are {names}, or a .yaml file")
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
        base = str(tree["recipe"])
        variants = {str(name): [*map(str, own)] for name, own in dict(tree["variants"]).items()}
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path}: a sweep has `recipe: NAME` and `variants: {{name: [key.path=value, ...]}}`"
        ) from None
    return [
        _cell(base, [f"name={name}", *overrides, *own], seed)
        for seed in seeds
        for name, own in variants.items()
    ]


def _cell(source: str, overrides: Sequence[str], seed: int) -> Cell:
    if any(override.partition("=")[0].strip() == "training.seed" for override in overrides):
        raise ConfigError("training.seed: seeds of a comparison are given by --seeds")
    asked = (*overrides, f"training.seed={seed}")
    return Cell(source, asked, load_recipe(source, list(asked)))
