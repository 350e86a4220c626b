"""Figures of runs that iterate, remember or leave weights out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sra_ds.analysis.canvas import or_nan, row_of, write

Metrics = list[dict[str, Any]]


def resonance_figures(steps: Metrics) -> dict[str, Figure]:
    """Those that the logged steps of a run have something for."""
    figures = {}
    if "halting" in steps[-1]:
        figures["entropy_over_steps"] = entropy_over_steps(steps)
        figures["entropy_by_iteration"] = entropy_by_iteration(steps[-1]["halting"])
        figures["iterations"] = iterations_figure(steps[-1]["halting"])
    if any(name.endswith("memory_rms") for name in steps[-1].get("facts", {})):
        figures["memory"] = memory_figure(steps)
    return figures


def entropy_over_steps(steps: Metrics) -> Figure:
    """Relative entropy of each iteration against the training step, layer by layer."""
    layers = len(steps[-1]["halting"])
    figure, grid = row_of(layers)
    x = [step["step"] for step in steps]
    for layer, axes in enumerate(grid):
        found = [step["halting"][layer]["entropy"] for step in steps]
        for number in range(len(found[0])):
            mean, low, high = (
                [or_nan(entropy[number][key]) for entropy in found]
                for key in ("mean", "p10", "p90")
            )
            axes.plot(x, mean, label=f"iteration {number + 1}")
            axes.fill_between(x, low, high, alpha=0.15)
        axes.set_title(f"layer {layer}")
        axes.set_xlabel("step")
    grid[0].set_ylabel("entropy / ln(visible)")
    grid[0].legend(fontsize=8)
    return figure


def entropy_by_iteration(layers: Metrics) -> Figure:
    """Relative entropy of each layer's iterations at the last step: mean, 10th and 90th percentiles."""
    figure, (axes,) = row_of(1)
    for layer, own in enumerate(layers):
        entropy = own["entropy"]
        x = np.arange(1, len(entropy) + 1) + 0.06 * (layer - len(layers) / 2)
        mean = np.array([or_nan(row["mean"]) for row in entropy])
        low = mean - np.array([or_nan(row["p10"]) for row in entropy])
        high = np.array([or_nan(row["p90"]) for row in entropy]) - mean
        axes.errorbar(x, mean, yerr=np.maximum([low, high], 0), fmt="o-", label=f"layer {layer}")
    axes.set_xticks(range(1, len(layers[0]["entropy"]) + 1))
    axes.set_xlabel("iteration")
    axes.set_ylabel("entropy / ln(visible)")
    axes.legend(fontsize=8)
    return figure


def iterations_figure(layers: Metrics) -> Figure:
    """Share of the tokens by number of iterations, at the last step."""
    figure, (axes,) = row_of(1)
    width = 0.8 / len(layers)
    for layer, own in enumerate(layers):
        x = np.arange(1, len(own["shares"]) + 1) + width * (layer - (len(layers) - 1) / 2)
        label = f"layer {layer}, mean {own['iterations']:.2f}"
        axes.bar(x, own["shares"], width=width, label=label)
    axes.set_xticks(range(1, len(layers[0]["shares"]) + 1))
    axes.set_xlabel("iterations of a token")
    axes.set_ylabel("share of tokens")
    axes.legend(fontsize=8)
    return figure


def memory_figure(steps: Metrics) -> Figure:
    """What memories add beside their channel, and for slots how evenly they are read."""
    facts = [step["facts"] for step in steps]
    measures = {
        "memory_rms": "size over the channel's",
        "slot_entropy": "entropy of slots / ln S",
        "unread_slots": "share of slots not read",
        "memory_state_norm": "norm of the state",
    }
    known = [m for m in measures if any(name.endswith(m) for name in facts[-1])]
    figure, grid = row_of(len(known))
    x = [step["step"] for step in steps]
    for axes, measure in zip(grid, known, strict=True):
        for name in (name for name in facts[-1] if name.endswith(measure)):
            layer = name.split("/")[0]
            values = [own[name] for own in facts]
            if measure == "memory_rms":
                values = [
                    v / own[f"{layer}/channel_rms"] for v, own in zip(values, facts, strict=True)
                ]
            axes.plot(x, values, label=layer)
        axes.set_xlabel("step")
        axes.set_title(measures[measure], fontsize=9)
    grid[0].legend(fontsize=8)
    return figure


def mask_figure(masks: dict[str, NDArray[np.bool_]]) -> Figure:
    """Where weights live, with the share of them."""
    figure, grid = row_of(len(masks))
    for axes, (name, mask) in zip(grid, masks.items(), strict=True):
        axes.imshow(mask, cmap="gray_r", interpolation="nearest", aspect="auto")
        axes.set_title(f"{name}: {mask.mean():.1%} live", fontsize=9)
        axes.set_xlabel("from channel")
    grid[0].set_ylabel("to channel")
    return figure


def halting_figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Perplexity and time of the rules of `evaluation.halting` over those of halting softly, against the
    threshold."""
    hard = [row for row in rows if row["rule"].startswith("hard:")]
    x = [float(row["rule"].partition(":")[2]) for row in hard]
    figure, (left, right) = row_of(2)
    left.plot(x, [row["perplexity_over_soft"] for row in hard], "o-")
    left.axhline(1.0, color="black", linewidth=0.7, linestyle="--")
    left.set_ylabel("perplexity / soft")
    for part in ("mixers", "model"):
        right.plot(x, [row[f"{part}_time_over_soft"] for row in hard], "o-", label=part)
    right.axhline(1.0, color="black", linewidth=0.7, linestyle="--")
    right.set_ylabel("time / soft")
    right.legend()
    for axes in (left, right):
        axes.set_xlabel("threshold of hard halting")
    write(figure, path)


def iterations_by_type_figure(found: dict[str, Any], path: Path) -> None:
    """Mean iterations of each class of words with its interval, beside that of all tokens."""
    classes = sorted(found["classes"].items(), key=lambda item: item[1]["iterations"])
    figure, (axes,) = row_of(1)
    for y, (_, own) in enumerate(classes):
        mean = own["iterations"]
        reach = [[mean - or_nan(own["low"])], [or_nan(own["high"]) - mean]]
        axes.errorbar(mean, y, xerr=np.maximum(reach, 0), fmt="o", capsize=3, color="tab:blue")
    axes.set_yticks(range(len(classes)), [f"{n} ({own['tokens']:,})" for n, own in classes])
    axes.axvline(found["all"]["iterations"], color="black", linewidth=0.7, linestyle="--")
    axes.set_xlabel("iterations of a token, mean over layers (95 %)")
    write(figure, path)


def compression_figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Perplexity of the rows of a comparison against their share of live weights."""
    figure, (axes,) = row_of(1)
    for row in rows:
        mean, deviation = row["token_perplexity_mean"], row["token_perplexity_sd"]
        axes.errorbar(
            row["live_share"], mean, yerr=deviation, fmt="o", capsize=4, label=row["recipe"]
        )
    axes.set_xlabel("share of live weights in the feed-forward networks")
    axes.set_ylabel("validation token perplexity")
    axes.legend(fontsize=8)
    write(figure, path)
