"""Where two recipes differ, key by key."""

from typing import Any, NamedTuple


class Difference(NamedTuple):
    """A dotted path and its two values; None for one that lacks the key."""

    path: str
    one: Any
    other: Any


def first_difference(
    one: dict[str, Any], other: dict[str, Any], but: tuple[str, ...] = ()
) -> Difference | None:
    """The first, by path, of two recipes as trees; `but` are beginnings of paths that may differ."""
    first, second = _leaves(one), _leaves(other)
    for path in sorted(first.keys() | second.keys()):
        if first.get(path) != second.get(path) and not path.startswith(but):
            return Difference(path, first.get(path), second.get(path))
    return None


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {
        k: v for key, value in tree.items() for k, v in _leaves(value, f"{prefix}{key}.").items()
    }
