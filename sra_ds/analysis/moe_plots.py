"""Figures of runs whose experts hear each other, are pushed apart or wake up."""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sra_ds.analysis.canvas import row_of

Metrics = list[dict[str, Any]]


class Connections(NamedTuple):
    """The last round of a layer's coupling."""

    strengths_EE: NDArray[Any]
    """How much expert i (row) hears of expert j."""
    hyperedges: dict[str, float]
    """Weight of each hyperedge by its members; empty for a graph."""


def moe_figures(metrics: Metrics, connections: list[Connections]) -> dict[str, Figure]:
    """Those that a run has something for."""
    figures = {}
    if connections:
        figures["expert_connections"] = connections_figure(connections)
    if connections and len(connections[0].hyperedges) > 1:
        figures["hyperedge_weights"] = hyperedges_figure(connections)
    measured = [line for line in metrics if "specialisation" in line]
    if measured:
        figures["specialisation"] = specialisation_figure(measured)
    steps = [line for line in metrics if "saturation" in line]
    if steps:
        woken = [line for line in metrics if "ghost" in line]
        figures["ghosts"] = ghosts_figure(steps, woken)
    return figures


def connections_figure(connections: list[Connections]) -> Figure:
    """Who hears whom of the others, layer by layer."""
    figure, grid = row_of(len(connections))
    for layer, (axes, own) in enumerate(zip(grid, connections, strict=True)):
        others_EE = own.strengths_EE.copy()
        np.fill_diagonal(others_EE, np.nan)
        image = axes.imshow(others_EE, cmap="viridis")
        gap = f", spectral gap {spectral_gap(own.strengths_EE):.2f}" if own.hyperedges else ""
        axes.set_title(f"layer {layer}{gap}", fontsize=9)
        axes.set_xlabel("expert heard")
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, shrink=0.7)
    grid[0].set_ylabel("expert that hears")
    return figure


def spectral_gap(propagation_EE: NDArray[Any]) -> float:
    """1 less the second largest size of an eigenvalue: near 0 where groups of experts hear only each
    other, 1 where a single round tells everyone the same."""
    sizes = np.sort(np.abs(np.linalg.eigvals(propagation_EE)))[::-1]
    return float(1 - sizes[1]) if len(sizes) > 1 else 1.0


def hyperedges_figure(connections: list[Connections], most: int = 32) -> Figure:
    """The heaviest hyperedges of each layer beside 1, which they all started from."""
    figure, grid = row_of(len(connections))
    for layer, (axes, own) in enumerate(zip(grid, connections, strict=True)):
        ordered = sorted(own.hyperedges.items(), key=lambda item: -item[1])[:most]
        names, weights = zip(*ordered, strict=True)
        axes.plot(weights, range(len(names)), "o", markersize=3)
        axes.set_yticks(range(len(names)), names, fontsize=5)
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=0.7, linestyle="--")
        axes.set_title(f"layer {layer}")
        axes.set_xlabel("weight")
    grid[0].set_ylabel("members")
    return figure


def specialisation_figure(measured: Metrics) -> Figure:
    """1 - CKA of each layer's experts over the run, and the weights that follow from it."""
    rows = [line["specialisation"] for line in measured]
    weighed = rows[-1]["weights"] is not None
    figure, grid = row_of(1 + weighed)
    x = [line["step"] for line in measured]
    for layer in range(len(rows[-1]["scores"])):
        grid[0].plot(x, [row["scores"][layer] for row in rows], "o-", label=f"layer {layer}")
        if weighed:
            grid[1].plot(x, [row["weights"][layer] for row in rows], "o-")
    grid[0].set_ylabel("specialisation, 1 - CKA")
    grid[0].set_ylim(0, 1)
    grid[0].legend(fontsize=8)
    if weighed:
        grid[1].set_ylabel("weight of orthogonality")
    for axes in grid:
        axes.set_xlabel("step")
    return figure


def ghosts_figure(steps: Metrics, woken: Metrics) -> Figure:
    """Saturation of each layer and how awake its ghosts are; marks where one began to wake."""
    figure, (left, right) = row_of(2)
    x = [line["step"] for line in steps]
    for layer in range(len(steps[-1]["saturation"])):
        facts = [line["facts"] for line in steps]
        (drawn,) = left.plot(x, [line["saturation"][layer] for line in steps])
        for line in woken:
            if line["ghost"]["layer"] == layer:
                left.plot(line["step"], line["ghost"]["saturation"], "v", color=drawn.get_color())
        right.plot(x, [own[f"layer{layer}/ghost_alpha"] for own in facts], label=f"layer {layer}")
    left.set_ylabel("saturation")
    left.set_ylim(0, 1)
    right.set_ylabel("sum of alpha over ghosts")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("step")
    return figure
