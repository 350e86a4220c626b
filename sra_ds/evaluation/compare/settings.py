"""Settings of cells as they are kept: recipes without the places of a machine, and how two differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sra_ds.config import Recipe, difference
from sra_ds.config.loading import validate


def portable(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a tree for JSON, with the names alone of files and folders, whose places differ from
    machine to machine."""

    def named(value: Any) -> Any:
        if isinstance(value, Path):
            return value.name
        if isinstance(value, dict):
            return {key: named(own) for key, own in value.items()}
        return [named(own) for own in value] if isinstance(value, (list, tuple)) else value

    tree: dict[str, Any] = named(recipe.model_dump())
    return tree


def first_difference(
    settings: dict[str, Any], others: dict[str, Any], but: Sequence[str] = ()
) -> str | None:
    """The first key at which two `portable` recipes differ, with their values; `but` are beginnings of
    paths that may. A key that one lacks has its default there: it came with a later version."""
    known, other = (portable(validate(tree)) for tree in (settings, others))
    found = difference.first_difference(known, other, tuple(but))
    return None if found is None else f"{found.path}: {found.one} there, {found.other} here"
