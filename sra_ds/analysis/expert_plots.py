"""Figures of an analysis: what the layers and experts do, beside chance and null.

Lines and text have one colour, which a page that embeds the SVG replaces by that of its own text.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sra_ds.analysis.analysis import Analysis
from sra_ds.analysis.syntax import CLASSES

INK = "#7a7a7b"
"""Readable on white and on black; pages replace it in SVG files."""
STYLE = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "legend.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
}
MAPPED_NAMES = 60


def draw_analysis(analyses: list[Analysis], folder: Path) -> dict[str, Path]:
    """Write the figures that apply to the first analysis, others beside it where they are comparable, as
    PNG and SVG; the SVG files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw(analyses)
            if figure is None:
                continue
            paths[name] = folder / f"{name}.svg"
            with plt.rc_context({"svg.hashsalt": name}):
                figure.savefig(paths[name], bbox_inches="tight", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight", facecolor="white")
            plt.close(figure)
    return paths


def _grid(rows: int, columns: int, height: float, **shared: Any) -> tuple[Figure, NDArray[Any]]:
    """Axes of a figure as wide as a page; `height` in inches."""
    figure: Figure
    figure, grid = plt.subplots(rows, columns, figsize=(7.2, height), squeeze=False, **shared)
    return figure, grid


def _measures(analyses: list[Analysis]) -> Figure | None:
    """Every measure, layer by layer: value with interval, null and untrained twin."""
    names = list(dict.fromkeys(name for a in analyses for layer in a.measures for name in layer))
    rows = -(-len(names) // 2)
    figure, grid = _grid(rows, 2, 1.9 * rows)
    for axes in grid.ravel()[len(names) :]:
        axes.set_visible(False)
    for name, axes in zip(names, grid.ravel(), strict=False):
        for number, analysis in enumerate(analyses):
            found = [(n, m[name]) for n, m in enumerate(analysis.measures) if name in m]
            at = np.array([n for n, _ in found]) + 0.18 * number
            values = np.array([one.value for _, one in found])
            errors = np.array([[one.value - one.low, one.high - one.value] for _, one in found]).T
            errors = np.nan_to_num(errors).clip(min=0)
            axes.errorbar(at, values, errors, fmt="o", ms=4, label=analysis.facts["label"])
            if number == 0:
                axes.plot(
                    at, [one.null_95 for _, one in found], "_", ms=12, color=INK, label="null, 95 %"
                )
                axes.plot(
                    at, [one.untrained for _, one in found], "x", ms=5, color=INK, label="untrained"
                )
        axes.set_title(name.replace("_", " "))
        axes.set_xticks(range(len(analyses[0].measures)))
    for axes in grid.ravel()[max(len(names) - 2, 0) : len(names)]:
        axes.set_xlabel("layer")
    figure.tight_layout()
    columns = 2 + len(analyses)
    grid[0, 0].legend(loc="lower center", bbox_to_anchor=(1.05, 1.15), ncols=columns, fontsize=8)
    return figure


def _coherence(analyses: list[Analysis]) -> Figure | None:
    """C_NPMI of every expert over the 95 % null of its own word frequencies, sorted."""
    ranked = {}
    for analysis in analyses:
        measured = (p.coherence for layer in analysis.profiles for p in layer)
        margins = np.array([one.value - one.null_95 for one in measured])
        ranked[analysis.facts["label"]] = np.sort(margins[np.isfinite(margins)])[::-1]
    if not any(margins.size for margins in ranked.values()):
        return None
    figure, ((axes,),) = _grid(1, 1, 3.2)
    for name, margins in ranked.items():
        axes.plot(np.linspace(0, 1, len(margins)), margins, label=name)
    axes.axhline(0.0, color=INK, linewidth=0.8, linestyle="--")
    axes.set_xlabel("share of the experts, most coherent first")
    axes.set_ylabel("C_NPMI less its 95 % null")
    axes.legend()
    return figure


def _load(analyses: list[Analysis]) -> Figure | None:
    """Load of each expert over the mean, sorted, per layer."""
    layers = len(analyses[0].loads)
    figure, grid = _grid(1, layers, 2.2, sharey=True)
    for layer, axes in enumerate(grid[0]):
        for analysis in analyses:
            load_E = analysis.loads[layer]
            axes.plot(
                np.sort(load_E)[::-1] / max(load_E.mean(), 1e-9), label=analysis.facts["label"]
            )
        axes.axhline(1.0, color=INK, linewidth=0.7, linestyle="--")
        axes.set_title(f"layer {layer}")
    grid[0, 0].set_ylabel("load over the mean")
    grid[0, 0].legend(fontsize=7)
    figure.tight_layout()
    return figure


def _syntax(analyses: list[Analysis]) -> Figure | None:
    """Parts of speech of what each expert is given."""
    return _heat_maps(
        [
            np.array([[p.classes[c] for p in layer] for c in CLASSES])
            for layer in analyses[0].profiles
        ],
        list(CLASSES),
        "share of an expert's routes",
    )


def _domains(analyses: list[Analysis]) -> Figure | None:
    """Share of each domain's routes that goes to each expert."""
    domains = analyses[0].facts["domains"]
    if len(domains) < 2:
        return None
    return _heat_maps(
        [
            np.array([[p.domains[d] for p in layer] for d in domains])
            for layer in analyses[0].profiles
        ],
        domains,
        "share of a domain's routes",
    )


def _heat_maps(rows_by_layer: list[NDArray[Any]], names: list[str], label: str) -> Figure:
    layers = len(rows_by_layer)
    height = 0.16 * len(names) + 0.5
    figure, grid = _grid(layers, 1, height * layers + 0.4)
    for layer, (axes, rows) in enumerate(zip(grid[:, 0], rows_by_layer, strict=True)):
        order = np.lexsort((-rows.max(0), rows.argmax(0)))
        image = axes.imshow(
            rows[:, order], aspect="auto", cmap="viridis", vmin=0, interpolation="none"
        )
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.set_xticks([])
        axes.set_title(f"layer {layer}: experts, by their largest share")
        figure.colorbar(image, ax=axes, fraction=0.03)
    figure.supylabel(label, fontsize=8)
    figure.tight_layout()
    return figure


def _co_activation(analyses: list[Analysis]) -> Figure | None:
    """Of the tokens of one expert, the share that another serves, too."""
    if analyses[0].facts["top_k"] < 2:
        return None
    shares = []
    for pairs_EE in analyses[0].pairs:
        load_E = pairs_EE.diagonal().clip(min=1)
        shares.append((pairs_EE - np.diag(pairs_EE.diagonal())) / load_E[:, None])
    return _squares(shares, "viridis", 0.0, "share of the row's tokens")


def _anchor_cosines(analyses: list[Analysis]) -> Figure | None:
    """Cosines between anchors."""
    return _squares(analyses[0].grams, "RdBu_r", -1.0, "cosine") if analyses[0].grams else None


def _squares(matrices: list[NDArray[Any]], colours: str, low: float, label: str) -> Figure:
    figure, grid = _grid(1, len(matrices), 7.2 / len(matrices))
    high = 1.0 if low < 0 else max(float(matrix.max()) for matrix in matrices)
    for layer, (axes, matrix) in enumerate(zip(grid[0], matrices, strict=True)):
        image = axes.imshow(matrix, vmin=low, vmax=high, cmap=colours, interpolation="none")
        axes.set_title(f"layer {layer}")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(image, ax=list(grid[0]), label=label, shrink=0.7, location="bottom")
    return figure


def _anchor_map(analyses: list[Analysis]) -> Figure | None:
    """Anchors and the commonest tokens in a plane."""
    maps = analyses[0].maps
    if not maps:
        return None
    rows = -(-len(maps) // 2)
    figure, grid = _grid(rows, 2, 3.4 * rows)
    for layer, (axes, one) in enumerate(zip(grid.ravel(), maps, strict=False)):
        axes.scatter(*one.tokens_S2.T, s=4, alpha=0.5, label="common tokens")
        axes.scatter(*one.anchors_E2.T, s=14, marker="^", label="anchors")
        for name, place in list(zip(one.names_S, one.tokens_S2, strict=True))[:MAPPED_NAMES]:
            axes.annotate(name.strip().replace("$", r"\$"), place, fontsize=5)
        axes.set_title(f"layer {layer}: {one.note}")
        axes.set_xticks([])
        axes.set_yticks([])
    grid[0, 0].legend(fontsize=7)
    figure.tight_layout()
    return figure


def _saturation(analyses: list[Analysis]) -> Figure | None:
    """How much of the last routing each checkpoint had already."""
    if not any(len(a.facts["saturation"]) > 1 for a in analyses):
        return None
    figure, ((axes,),) = _grid(1, 1, 3.0)
    for analysis, line in zip(analyses, ("-", "--", ":", "-."), strict=False):
        settled = analysis.facts["saturation"]
        steps = [int(step) for step in settled]
        for layer, shares in enumerate(np.array(list(settled.values())).T):
            label = f"{analysis.facts['label']}, layer {layer}"
            axes.plot(steps, shares, line, marker=".", color=f"C{layer}", label=label)
    for experts in sorted({len(load_E) for load_E in analyses[0].loads}):
        chance = analyses[0].facts["top_k"] / experts
        axes.axhline(chance, color=INK, linestyle="--", linewidth=0.7)
    axes.set_xlabel("step")
    axes.set_ylabel("share of the final choices")
    axes.legend(fontsize=6, ncols=len(analyses))
    return figure


def _sweeps(analyses: list[Analysis]) -> Figure | None:
    """Perplexity with other k, and with experts suppressed."""
    swept = [a for a in analyses if a.facts["sweeps"]]
    if not swept:
        return None
    figure, ((by_k, by_drop),) = _grid(1, 2, 3.0)
    for number, analysis in enumerate(swept):
        rows, name = analysis.facts["sweeps"]["k"], analysis.facts["label"]
        by_k.plot([r["k"] for r in rows], [r["token_perplexity"] for r in rows], "o-", label=name)
        for first, line in (("least", "-"), ("most", ":")):
            dropped = analysis.facts["sweeps"].get("dropped", ())
            rows = [r for r in dropped if r["first"] == first]
            by_drop.plot(
                [r["share"] for r in rows],
                [r["token_perplexity"] for r in rows],
                line, marker=".", color=f"C{number}", label=f"{name}, {first} loaded first",
            )  # fmt: skip
    by_k.axvline(analyses[0].facts["top_k"], color=INK, linestyle="--", linewidth=0.7)
    by_k.set_xlabel("experts per token")
    by_k.set_ylabel("token perplexity")
    by_drop.set_xlabel("share of the experts suppressed")
    by_drop.set_yscale("log")
    by_drop.legend(fontsize=6)
    by_k.legend(fontsize=7)
    figure.tight_layout()
    return figure


FIGURES: dict[str, Callable[[list[Analysis]], Figure | None]] = {
    "measures": _measures,
    "coherence": _coherence,
    "load": _load,
    "syntax": _syntax,
    "domains": _domains,
    "co_activation": _co_activation,
    "anchor_cosines": _anchor_cosines,
    "anchor_map": _anchor_map,
    "saturation": _saturation,
    "sweeps": _sweeps,
}
