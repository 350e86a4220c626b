"""Figures of runs with waves and wavelets: what is drawn is what was logged."""

from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib import pyplot as plt

from sra_ds.analysis.spectral_plots import Spectrum, band_figure, spectral_figures

BANDS = ("d1", "d2", "a2")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def facts(step: int) -> dict[str, float]:
    found = {"embedding/ratio": 0.1 * step, "embedding/effective_rank": 40.0 + step}
    for layer in range(3):
        for number, band in enumerate(BANDS):
            found[f"layer{layer}/energy_{band}"] = (number + layer) / (3 + 3 * layer)
            found[f"layer{layer}/gate_{band}"] = 0.25
        found[f"layer{layer}/filter_drift"] = 0.01 * step * layer
    return found


STEPS = [{"step": step, "facts": facts(step)} for step in (1, 2, 3)]


def test_only_what_applies_is_drawn() -> None:
    spectrum = Spectrum(np.arange(1.0, 5), np.ones(4))
    assert set(spectral_figures(STEPS, spectrum)) == {
        *("spectrum", "effective_rank", "hybrid_ratio", "bands", "filter_drift")
    }
    chosen = [{"step": 1, "facts": {"layer0/choice_haar": 0.4, "layer0/choice_db2": 0.6}}]
    assert set(spectral_figures(chosen, None)) == {"filter_choice"}
    assert spectral_figures([{"step": 1, "facts": {}}], None) == {}
    assert spectral_figures([], None) == {}


def test_lines_are_the_logged_values() -> None:
    figures = spectral_figures(STEPS, None)
    (line,) = figures["hybrid_ratio"].axes[0].lines
    assert list(line.get_xdata()) == [1, 2, 3]
    assert list(line.get_ydata()) == pytest.approx([0.1, 0.2, 0.3])
    drifts = figures["filter_drift"].axes[0].lines
    assert [line.get_ydata()[-1] for line in drifts] == pytest.approx([0, 0.03, 0.06])


def test_bands_are_a_row_for_each_layer() -> None:
    figure = band_figure(STEPS[-1]["facts"], BANDS)
    energies = figure.axes[0].images[0].get_array()
    assert energies.shape == (3, 3)
    assert energies[2].tolist() == pytest.approx([2 / 9, 3 / 9, 4 / 9])
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == list(BANDS)
