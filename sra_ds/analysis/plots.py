"""Figures of a run, drawn from its files."""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from sra_ds.analysis.moe_plots import Connections, moe_figures
from sra_ds.analysis.resonance_plots import compression_figure, mask_figure, resonance_figures
from sra_ds.analysis.spectral_plots import Spectrum, spectral_figures

Metrics = list[dict[str, Any]]

MIN_HEIGHT, ROW_HEIGHT = 3.6, 0.24
"""Inches of a comparison, and of each of its rows."""
WIDE = 2.0
"""Perplexities further apart than so many times stand on a logarithmic axis."""


class Shown(NamedTuple):
    """What of a finished model is drawn."""

    loads: list[NDArray[Any]]
    """Routes per expert of each routed layer."""
    grams: list[NDArray[Any]]
    """Cosines between anchors, of each layer that has any."""
    masks: dict[str, NDArray[np.bool_]]
    """Those of the sparse matrices of one layer."""
    connections: list[Connections]
    """Of each layer whose experts are coupled."""
    spectrum: Spectrum | None
    """Of an embedding made of waves."""


def draw_run(metrics: Metrics, shown: Shown, folder: Path) -> list[Path]:
    """Write the figures that apply to this run; returns their paths."""
    loads, grams, masks, connections, spectrum = shown
    steps = [line for line in metrics if "loss" in line]
    checks = [line for line in metrics if "validation" in line]
    figures: dict[str, Figure] = {}
    if steps:
        figures["loss"] = loss_figure(steps, checks)
        figures["learning_rate"] = line_figure(steps, "learning_rate", "learning rate")
        figures |= resonance_figures(steps)
    figures |= spectral_figures(steps, spectrum)
    if checks:
        figures["perplexity"] = perplexity_figure(checks)
    if loads:
        figures["expert_load"] = load_figure(loads)
    figures |= moe_figures(metrics, connections)
    if masks:
        figures["mask"] = mask_figure(masks)
    if grams:
        figures["anchor_similarity"] = gram_figure(grams)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)
        paths.append(path)
    return paths


def loss_figure(steps: Metrics, checks: Metrics) -> Figure:
    """Training and validation loss over tokens."""
    figure, axes = _axes("tokens", "loss (nats per token)")
    axes.plot([s["tokens"] for s in steps], [s["cross_entropy"] for s in steps], label="training")
    per_step = steps[-1]["tokens"] / steps[-1]["step"]
    if checks:
        x = [c["step"] * per_step for c in checks]
        axes.plot(
            x, [c["validation"]["capped_nll_per_token"] for c in checks], "o-", label="validation"
        )
    axes.legend()
    return figure


def perplexity_figure(checks: Metrics) -> Figure:
    """Validation perplexity over epochs, always on the documents of the capped evaluations."""
    figure, axes = _axes("epoch", "validation token perplexity")
    perplexities = np.exp([c["validation"]["capped_nll_per_token"] for c in checks])
    axes.plot([c["epoch"] for c in checks], perplexities, "o-")
    return figure


def line_figure(steps: Metrics, key: str, label: str) -> Figure:
    """One metric over steps."""
    figure, axes = _axes("step", label)
    axes.plot([s["step"] for s in steps], [s[key] for s in steps])
    return figure


def load_figure(loads: list[NDArray[Any]]) -> Figure:
    """Share of routes per expert and layer, relative to an even share."""
    figure: Figure
    figure, grid = plt.subplots(
        len(loads), 1, figsize=(7, 1.3 * len(loads) + 0.6), sharex=True, squeeze=False
    )
    for layer, (axes, load_E) in enumerate(zip(grid[:, 0], loads, strict=True)):
        share_E = np.sort(load_E)[::-1] / max(load_E.mean(), 1e-12)
        axes.bar(np.arange(len(load_E)), share_E, width=1.0)
        axes.axhline(1.0, color="black", linewidth=0.7, linestyle="--")
        axes.set_ylabel(f"layer {layer}")
    grid[0, 0].set_title("load of each expert over the mean load, sorted")
    grid[-1, 0].set_xlabel("expert, fullest first")
    return figure


def gram_figure(grams: list[NDArray[Any]]) -> Figure:
    """Cosines between anchors, layer by layer."""
    figure: Figure
    figure, grid = plt.subplots(1, len(grams), figsize=(2.6 * len(grams) + 1, 2.9), squeeze=False)
    for layer, (axes, gram) in enumerate(zip(grid[0], grams, strict=True)):
        image = axes.imshow(gram, vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set_title(f"layer {layer}")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(image, ax=list(grid[0]), label="cosine of two anchors", shrink=0.8)
    return figure


def draw_comparison(rows: list[dict[str, Any]], folder: Path) -> None:
    """Perplexities side by side, and against the share of live weights where that differs."""
    comparison_figure(rows, folder / "comparison.png")
    sparse = [row for row in rows if row["live_share"] is not None]
    if len({row["live_share"] for row in sparse}) > 1:
        compression_figure(sparse, folder / "compression.png")


def comparison_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Mean and standard deviation of the perplexity of each recipe over its seeds, the best first."""
    rows = sorted(rows, key=lambda row: float(row["token_perplexity_mean"]))
    figure, axes = _axes("validation token perplexity", "")
    figure.set_figheight(max(MIN_HEIGHT, ROW_HEIGHT * len(rows)))
    names = [row["recipe"] for row in rows]
    means = [row["token_perplexity_mean"] for row in rows]
    deviations = [row["token_perplexity_sd"] or 0.0 for row in rows]
    axes.errorbar(means, range(len(rows)), xerr=deviations, fmt="o", capsize=5)
    for y, row in enumerate(rows):
        seeds = row["token_perplexities"]
        axes.plot(seeds, [y] * len(seeds), "x", color="gray")
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if means[-1] > WIDE * means[0]:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def scaling_figure(study: dict[str, Any], path: Path) -> None:
    """Tokens per second of `planning.study`: per GPU with the batch growing, in all with it fixed. A band
    reaches from no overlap to all of it."""
    figure, (weak, strong) = plt.subplots(1, 2, figsize=(10.5, 4.0))
    for axes, kind, per_gpu in ((weak, "weak", True), (strong, "strong", False)):
        for name in dict.fromkeys(row["recipe"] for row in study[kind]):
            rows = [row for row in study[kind] if row["recipe"] == name]
            gpus = np.array([row["gpus"] for row in rows])
            speeds = np.array([row["tokens_per_second"] for row in rows])
            speeds = speeds / gpus[:, None] if per_gpu else speeds
            axes.fill_between(gpus, speeds[:, 1], speeds[:, 0], alpha=0.35, label=name)
            axes.plot(gpus, speeds[:, 1], marker=".")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_yscale("log")
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.3)
    weak.set_ylabel("tokens per second and GPU")
    weak.set_title(f"{study['tokens_per_gpu']:,} tokens a step on every GPU")
    strong.set_ylabel("tokens per second")
    strong.set_title("the recipe's own batch")
    strong.legend(loc="lower right")
    note = "bands from nothing overlapping (line) to everything, which is more than can"
    figure.suptitle(f"calculated from data sheets, measured nowhere; {note}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(figsize=(6, 3.6))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes
