"""Figures of runs with waves in their embedding or wavelets in their mixers."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sra_ds.analysis.canvas import row_of

Metrics = list[dict[str, Any]]


class Spectrum(NamedTuple):
    """Mean amplitude of each wave over the vocabulary, and its periods over the width."""

    periods_H: NDArray[np.float64]
    amplitude_H: NDArray[np.float64]


def spectral_figures(steps: Metrics, spectrum: Spectrum | None) -> dict[str, Figure]:
    """Those that the logged steps and the finished model have something for."""
    facts = steps[-1].get("facts", {}) if steps else {}
    figures = {}
    if spectrum is not None:
        figures["spectrum"] = spectrum_figure(spectrum)
    if "embedding/effective_rank" in facts:
        figures["effective_rank"] = over_steps(
            steps, ["embedding/effective_rank"], "effective rank of the vectors of 512 tokens"
        )
    if "embedding/ratio" in facts:
        figures["hybrid_ratio"] = over_steps(steps, ["embedding/ratio"], "share of the waves")
    if bands := _bands(facts):
        figures["bands"] = band_figure(facts, bands)
    if drifts := [name for name in facts if name.endswith("filter_drift")]:
        figures["filter_drift"] = over_steps(steps, drifts, "change of the filter / its size")
    if choices := [name for name in facts if "/choice_" in name]:
        figures["filter_choice"] = over_steps(steps, choices, "chance of the family")
    return figures


def spectrum_figure(spectrum: Spectrum) -> Figure:
    """Mean amplitude against the number of periods."""
    figure, (axes,) = row_of(1)
    axes.stem(spectrum.periods_H, spectrum.amplitude_H, basefmt=" ", markerfmt=".")
    axes.set_xlabel("periods over the width")
    axes.set_ylabel("mean amplitude over the vocabulary")
    return figure


def over_steps(steps: Metrics, names: Sequence[str], label: str) -> Figure:
    """Some facts against the training step."""
    figure, (axes,) = row_of(1)
    x = [step["step"] for step in steps]
    for name in names:
        axes.plot(x, [step["facts"][name] for step in steps], label=name.replace("/choice_", " "))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if len(names) > 1:
        axes.legend(fontsize=8)
    return figure


def band_figure(facts: dict[str, float], bands: Sequence[str]) -> Figure:
    """Energy of the bands, and how they are weighed, layer by layer at the last step."""
    layers = 1 + max(int(found[1]) for name in facts if (found := re.match(r"layer(\d+)/", name)))
    figure, grid = row_of(2)
    for axes, measure in zip(grid, ("energy", "gate"), strict=True):
        values_LJ = np.array(
            [[facts[f"layer{n}/{measure}_{band}"] for band in bands] for n in range(layers)]
        )
        image = axes.imshow(values_LJ, cmap="viridis", vmin=0, aspect="auto")
        for (layer, band), value in np.ndenumerate(values_LJ):
            axes.text(band, layer, f"{value:.2f}", ha="center", va="center", color="white")
        axes.set_xticks(range(len(bands)), bands)
        axes.set_yticks(range(layers))
        axes.grid(visible=False)
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes)
    grid[0].set_title("share of the energy")
    grid[1].set_title("mean gate")
    return figure


def _bands(facts: dict[str, float]) -> list[str]:
    """Those of the first layer, finest first."""
    return [
        name.removeprefix("layer0/energy_") for name in facts if name.startswith("layer0/energy_")
    ]
