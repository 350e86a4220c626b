"""Scoring by several processes: which part one takes."""

from typing import TypeVar

from sra_ds.processes import rank, several, world_size

Item = TypeVar("Item")


def share_of_rank(items: list[Item], batch_size: int, filler: Item) -> list[Item]:
    """What this rank scores. Every rank runs the same number of forward passes, which ZeRO-3 needs:
    short shares are filled."""
    if not several():
        return items
    size = -(-len(items) // world_size())
    size = -(-size // batch_size) * batch_size
    mine = items[rank() * size : (rank() + 1) * size]
    return mine + [filler] * (size - len(mine))
