"""Figures of coupled experts, specialisation and ghosts: only those that apply."""

from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from sra_ds.analysis.moe_plots import Connections, moe_figures, spectral_gap

STRENGTHS = np.array([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.0, 0.5, 0.5]])
PLAIN = {"step": 1, "facts": {"layer0/stream_rms": 1.0}}
MEASURED = {"step": 1, "specialisation": {"scores": [0.4, 0.5], "weights": None, "collapsed": []}}
SATURATED = {
    "step": 2,
    "saturation": [0.4, 0.7],
    "facts": {"layer0/ghost_alpha": 0.0, "layer1/ghost_alpha": 0.5},
}
AWOKEN = {"step": 2, "ghost": {"layer": 1, "ghost": 0, "saturation": 0.7}}
PAIRS = Connections(STRENGTHS, {"0-1": 1.5, "1-2": 0.5})


@pytest.mark.parametrize(
    "metrics, connections, expected",
    [
        ([PLAIN], [], set()),
        ([PLAIN], [Connections(STRENGTHS, {})], {"expert_connections"}),
        ([PLAIN], [PAIRS, PAIRS], {"expert_connections", "hyperedge_weights"}),
        ([PLAIN], [Connections(STRENGTHS, {"0-1-2": 1.0})], {"expert_connections"}),
        ([PLAIN, MEASURED], [], {"specialisation"}),
        ([SATURATED, AWOKEN], [], {"ghosts"}),
    ],
)
def test_a_run_has_the_figures_it_has_something_for(
    metrics: list[dict[str, Any]], connections: list[Connections], expected: set[str]
) -> None:
    figures = moe_figures(metrics, connections)
    assert set(figures) == expected
    plt.close("all")


def test_what_is_drawn_is_what_was_measured() -> None:
    weighed = {**MEASURED, "specialisation": {**MEASURED["specialisation"], "weights": [0.1, 0.2]}}  # type: ignore[dict-item]
    figures = moe_figures([PLAIN, weighed, SATURATED, AWOKEN], [PAIRS])
    scores, weights = figures["specialisation"].axes
    assert [float(line.get_ydata()[-1]) for line in scores.lines] == [0.4, 0.5]
    assert [float(line.get_ydata()[-1]) for line in weights.lines] == [0.1, 0.2]
    saturation, alpha = figures["ghosts"].axes
    assert [float(line.get_ydata()[-1]) for line in saturation.lines] == [0.4, 0.7, 0.7]
    assert [float(line.get_ydata()[-1]) for line in alpha.lines] == [0.0, 0.5]
    (edges,) = figures["hyperedge_weights"].axes
    assert list(edges.lines[0].get_xdata()) == [1.5, 0.5]
    drawn = figures["expert_connections"].axes[0].images[0].get_array()
    assert np.ma.is_masked(drawn[1, 1]) or np.isnan(drawn[1, 1])
    assert float(drawn[1, 2]) == 0.25
    plt.close("all")


def test_the_spectral_gap_tells_groups_that_do_not_hear_each_other() -> None:
    apart = np.kron(np.eye(2), np.full((2, 2), 0.5))
    assert spectral_gap(apart) == pytest.approx(0.0, abs=1e-9)
    assert spectral_gap(np.full((4, 4), 0.25)) == pytest.approx(1.0)
    assert spectral_gap(STRENGTHS) == pytest.approx(0.5)
    assert spectral_gap(np.ones((1, 1))) == 1.0
