"""Settings of cells as they are kept: recipes without the places of a machine, and how two differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sra_ds.config import Recipe
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
    """Dotted path of the first key at which two `portable` recipes differ, with their values; `but` are
    paths that may. A key that one lacks has its default there: it came with a later version."""
    known, other = (portable(validate(tree)) for tree in (settings, others))
    return _first_difference(known, other, "", but)


def _first_difference(one: Any, other: Any, path: str, but: Sequence[str]) -> str | None:
    if path in but:
        return None
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys((*one, *other)):
            inner = f"{path}.{key}" if path else key
            found = _first_difference(one.get(key), other.get(key), inner, but)
            if found is not None:
                return found
        return None
    return None if one == other else f"{path}: {one} there, {other} here"
