"""What figures are drawn on."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def row_of(count: int) -> tuple[Figure, list[Any]]:
    """A figure with axes side by side."""
    figure, grid = plt.subplots(1, count, figsize=(max(5.0, 3.2 * count), 3.4), squeeze=False)
    for axes in grid[0]:
        axes.grid(alpha=0.3)
    figure.set_layout_engine("tight")
    return figure, list(grid[0])


def write(figure: Figure, path: Path) -> None:
    """To a file, and out of memory."""
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def or_nan(value: float | None) -> float:
    """A gap where there is nothing to draw."""
    return np.nan if value is None else value
