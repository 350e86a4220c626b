"""The figure of the coherence of texts, and what goes with it into a run's directory."""

import json
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sra_ds.analysis.canvas import or_nan, row_of, write
from sra_ds.evaluation.coherence.measures import MEASURES
from sra_ds.storage.run_dir import RunDir, write_atomically

BY_ORDER = ("entity", "discourse")
"""Those for which 0.5 is an order as good as any."""
COLOURS = {
    "generated": "tab:blue",
    "baseline": "tab:orange",
    "human": "tab:green",
    "sentence_shuffled": "0.35",
    "word_shuffled": "0.5",
    "looped": "0.65",
    "gibberish": "0.8",
}


def write_coherence(found: dict[str, Any], run: RunDir, name: str = "coherence") -> None:
    """`evaluation/NAME.json` and `figures/NAME.png` of what `score_coherence` found."""
    for folder in (run.evaluation, run.figures):
        folder.mkdir(exist_ok=True)
    write_atomically(run.evaluation / f"{name}.json", json.dumps(found, indent=1))
    write(coherence_figure(found["scores"]), run.figures / f"{name}.png")


def coherence_figure(scores: dict[str, Any]) -> Figure:
    """A group of bars for each measure, a bar with its interval for each kind of text; a gap where a
    measure is not defined."""
    figure, (axes,) = row_of(1)
    figure.set_size_inches(10, 3.8)
    at = np.arange(len(MEASURES))
    width = 0.85 / len(scores)
    for number, (kind, own) in enumerate(scores.items()):
        x = at + width * (number - (len(scores) - 1) / 2)
        value, low, high = (
            np.array([or_nan(own[measure][key]) for measure in MEASURES])
            for key in ("value", "low", "high")
        )
        reach = np.nan_to_num(np.maximum([value - low, high - value], 0))
        axes.bar(x, value, width, yerr=reach, capsize=2, color=COLOURS[kind], label=kind)
    for measure in BY_ORDER:
        place = MEASURES.index(measure)
        axes.hlines(0.5, place - 0.5, place + 0.5, "black", "--", linewidth=0.8)
    axes.set_xticks(at, MEASURES)
    axes.set_xlim(-0.5, len(MEASURES) - 0.5)
    axes.set_ylim(0, 1)
    axes.set_ylabel("coherence (95 % intervals)")
    axes.legend(fontsize=8, ncols=2)
    return figure
