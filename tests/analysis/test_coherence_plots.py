"""The figure of coherence shows the values and intervals it is given."""

import numpy as np
import pytest

from sra_ds.analysis.coherence_plots import BY_ORDER, coherence_figure
from sra_ds.evaluation.coherence.measures import MEASURES


def estimate(value: float | None, reach: float = 0.05) -> dict:
    low, high = (None, None) if value is None else (value - reach, value + reach)
    return {"value": value, "low": low, "high": high, "documents": 9}


def test_bars_are_values_and_their_ends_intervals() -> None:
    scores = {
        kind: {name: estimate(0.1 + 0.1 * n + 0.4 * k) for n, name in enumerate(MEASURES)}
        for k, kind in enumerate(("generated", "human"))
    }
    scores["generated"]["discourse"] = estimate(None)
    (axes,) = coherence_figure(scores).axes
    groups = {bars.get_label(): bars for bars in axes.containers if hasattr(bars, "patches")}
    assert list(groups) == ["generated", "human"]
    for kind, bars in groups.items():
        for name, bar in zip(MEASURES, bars.patches, strict=True):
            value = scores[kind][name]["value"]
            assert bar.get_height() == pytest.approx(
                np.nan if value is None else value, nan_ok=True
            )
        segments = bars.errorbar.lines[2][0].get_segments()
        drawn = [sorted(segment[:, 1]) for segment in segments if np.size(segment)]
        defined = [own for own in scores[kind].values() if own["value"] is not None]
        assert np.array(drawn) == pytest.approx(np.array([[o["low"], o["high"]] for o in defined]))
    assert len([line for line in axes.collections if line.get_linestyle()]) >= len(BY_ORDER)
    assert axes.get_ylim() == (0, 1)
