"""What finished cells say: a row a recipe, and by how much each differs from the first.

A difference is paired by seed and document and has one 95 % interval, over new seeds and new documents
together (`sra_ds.intervals.paired`). Which of two recipes is better is said where it excludes zero and
there is more than one seed.
"""

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from sra_ds.errors import ConfigError, DataError
from sra_ds.evaluation.compare.budgets import apart, require_matched
from sra_ds.evaluation.compare.finished import FinishedCell, Point, write_cell
from sra_ds.evaluation.compare.settings import first_difference
from sra_ds.intervals import Array, Estimate, paired
from sra_ds.storage.run_dir import write_atomically

MAY_DIFFER = (
    "description", "training.seed", "data.directory", "checkpoint.", "logging.", "parallel.",
)  # fmt: skip
"""Between runs of one recipe; so may the micro-batch, except where it is what documents fill."""
LONG = {
    "settings", "document_nll", "document_tokens", "budget", "experts", "coherence", "curve",
}  # fmt: skip
"""Of a cell, not in tables."""
MANY = 5
"""Differences from which on chance is spoken of."""
Row = dict[str, Any]


def _mean(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    """Mean and deviation of a figure, a dash where there is none."""

    def text(row: Row) -> str:
        value, deviation = row[f"{name}_mean"], row[f"{name}_sd"]
        spread = "" if deviation is None else f" ± {deviation / scale:{form}}"
        return "–" if value is None else f"{value / scale:{form}}{spread}"

    return text


QUALITY: dict[str, Callable[[Row], str]] = {
    "recipe": lambda row: str(row["recipe"]),
    "seeds": lambda row: str(len(row["seeds"])),
    "token perplexity": _mean("token_perplexity", ".2f"),
    "word perplexity": _mean("word_perplexity", ".1f"),
    "bits per byte": _mean("bits_per_byte", ".4f"),
    "accuracy": _mean("accuracy", ".2%"),
    "dead experts": _mean("dead_fraction", ".1%"),
    "load CV": _mean("load_cv", ".2f"),
    "coherent experts": _mean("coherent", ".0%"),
    "with untrained routers": _mean("coherent_untrained", ".0%"),
    "specialisation": _mean("specialisation", ".3f"),
}
COST: dict[str, Callable[[Row], str]] = {
    "recipe": lambda row: str(row["recipe"]),
    "parameters": lambda row: f"{row['total'] / 1e6:.2f} M",
    "active": lambda row: f"{row['active'] / 1e6:.2f} M",
    "MFLOP a token": lambda row: f"{row['flops'] / 1e6:.1f}",
    "tokens/s": _mean("tokens_per_second", ",.0f"),
    "minutes of steps": _mean("seconds", ".1f", 60),
    "memory, GB": _mean("peak_memory_bytes", ".2f", 1e9),
}
PROGRESS: dict[str, Callable[[Row], str]] = {
    "recipe": lambda row: str(row["recipe"]),
    "step": lambda row: f"{row['step']:,}",
    "epoch": lambda row: f"{row['epoch']:.2f}",
    "token perplexity": lambda row: f"{row['token_perplexity']:.2f}",
    "legacy, padding scored": lambda row: _or_dash(row["legacy_sra_perplexity"]),
    "legacy, padding at no cost": lambda row: _or_dash(
        row["legacy_sra_perplexity_if_padding_were_free"]
    ),
}
FIGURES = (
    "token_perplexity", "word_perplexity", "bits_per_byte", "accuracy", "nll_per_token", "dead_fraction",
    "load_cv", "coherent", "coherent_untrained", "specialisation", "tokens_per_second", "seconds",
    "peak_memory_bytes",
)  # fmt: skip


def compare(
    cells: Sequence[FinishedCell], against: str | None = None, matched: Sequence[str] = ()
) -> dict[str, Any]:
    """Rows, differences from the recipe `against` (the first), how far budgets are apart, and cells.
    Raises `DataError` when their text differs, `ConfigError` when their tokens do, or what was said to be
    `matched`."""
    _require_equal(cells, "corpus_fingerprint", DataError, "were trained on different text")
    for seed in {cell.seed for cell in cells}:  # documents fill budgets differently by seed
        own = [cell for cell in cells if cell.seed == seed]
        _require_equal(own, "tokens", ConfigError, "saw different numbers of tokens")
    _require_comparable(cells)
    by_recipe = {
        name: sorted((cell for cell in cells if cell.recipe == name), key=lambda cell: cell.seed)
        for name in dict.fromkeys(cell.recipe for cell in cells)
    }
    budgets = {name: own[0].budget for name, own in by_recipe.items()}
    require_matched(budgets, matched)
    if against is None:
        against = next(iter(by_recipe))
    if against not in by_recipe:
        raise ConfigError(f"--against {against}: compared are {', '.join(by_recipe)}")
    return {
        "rows": [_row(name, own) for name, own in by_recipe.items()],
        "differences": [
            difference(own, by_recipe[against])
            for name, own in by_recipe.items()
            if name != against
        ],
        "apart": apart(list(budgets.values())),
        "progress": [point for own in by_recipe.values() for point in _progress(own)],
        "cells": [_flat(cell) for cell in cells],
    }


def write_tables(
    result: dict[str, Any],
    cells: Sequence[FinishedCell],
    draw: Callable[[list[Row], Path], None],
    out: Path,
) -> None:
    """The cells, `comparison.json`, `.md` and `.csv`, and the figures."""
    for cell in cells:
        write_cell(cell, out)
    write_atomically(out / "comparison.json", json.dumps(result, indent=1))
    write_atomically(out / "comparison.md", markdown(result))
    with (out / "comparison.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(result["cells"][0]))
        writer.writeheader()
        writer.writerows(result["cells"])
    draw(result["rows"], out)


def difference(ours: Sequence[FinishedCell], theirs: Sequence[FinishedCell]) -> Row:
    """Nats per token by which the first are above the second, over the seeds both have, the ratio of
    their perplexities, and what may be said of it."""
    seeds = sorted({cell.seed for cell in ours} & {cell.seed for cell in theirs})
    names = {"recipe": ours[0].recipe, "against": theirs[0].recipe, "seeds": seeds}
    if not seeds:
        return {
            **names,
            "nats_per_token": None,
            "low": None,
            "high": None,
            "verdict": "no common seed",
        }
    ours_SK, theirs_SK = _by_seed(ours, seeds), _by_seed(theirs, seeds)
    found = paired(ours_SK, theirs_SK, ours[0].losses()[1])
    value = found.as_dict()
    return {
        **names,
        "nats_per_token": value["value"],
        "low": value["low"],
        "high": value["high"],
        "perplexity_ratio": math.exp(found.value),
        "verdict": _verdict(found, len(seeds)),
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables for people, what is matched, and a line for every difference."""
    widths = result["apart"]
    lines = [
        *_table(QUALITY, result["rows"]),
        "",
        *_table(COST, result["rows"]),
        "",
        f"Equal tokens and text. Apart by at most {widths['total']:.1%} in parameters, "
        f"{widths['active']:.1%} in active ones and {widths['flops']:.1%} in operations.",
        "",
        *(f"* {_sentence(difference)}" for difference in result["differences"]),
    ]
    if (count := len(result["differences"])) >= MANY:
        lines += ["", f"Of {count} intervals of equal recipes {count / 20:.1f} would exclude zero."]
    if len(result["progress"]) > len(result["rows"]):
        lines += [
            "",
            "While training, over the documents that every evaluation of a run scores:",
            "",
        ]
        lines += _table(PROGRESS, result["progress"])
    return "\n".join(lines).rstrip() + "\n"


def _table(columns: dict[str, Callable[[Row], str]], rows: Sequence[Row]) -> list[str]:
    """As markdown, without the columns that have nothing in any row."""
    filled = {title: [text(row) for row in rows] for title, text in columns.items()}
    filled = {title: own for title, own in filled.items() if set(own) != {"–"}}
    cells = [list(filled), ["---"] * len(filled), *map(list, zip(*filled.values(), strict=True))]
    return ["| " + " | ".join(line) + " |" for line in cells]


def _sentence(d: Row) -> str:
    start = f"{d['recipe']} against {d['against']}: {d['verdict']}"
    if d["low"] is None:
        return start
    nats = f"{d['nats_per_token']:+.4f} nats per token [{d['low']:+.4f}, {d['high']:+.4f}]"
    return f"{start} ({nats}, 95 % over {'seeds and ' if len(d['seeds']) > 1 else ''}documents)"


def _verdict(found: Estimate, seeds: int) -> str:
    if seeds < 2:
        return "one seed, which says nothing of the recipes"
    if not (found.low > 0 or found.high < 0):
        return "not told apart"
    word = "worse" if found.value > 0 else "better"
    ends = sorted(abs(math.expm1(end)) for end in (found.low, found.high))
    return (
        f"{word} by {abs(math.expm1(found.value)):.1%} of perplexity [{ends[0]:.1%}, {ends[1]:.1%}]"
    )


def _row(recipe: str, own: Sequence[FinishedCell]) -> Row:
    row: Row = {
        "recipe": recipe,
        "seeds": [cell.seed for cell in own],
        "token_perplexities": [cell.token_perplexity for cell in own],
        "live_share": own[0].live_share,
        **own[0].budget.model_dump(),
    }
    flat = [_flat(cell) for cell in own]
    for name in FIGURES:
        values = [cell[name] for cell in flat if cell[name] is not None]
        row[f"{name}_mean"] = mean(values) if values else None
        row[f"{name}_sd"] = stdev(values) if len(values) > 1 else None
    return row


def _progress(own: Sequence[FinishedCell]) -> list[Row]:
    """The evaluations of a recipe, means over its seeds."""
    return [
        {
            "recipe": own[0].recipe,
            **{
                name: mean(values) if None not in values else None
                for name in Point.model_fields
                for values in [[getattr(point, name) for point in at]]
            },
        }
        for at in zip(*(cell.curve for cell in own), strict=False)
    ]


def _flat(cell: FinishedCell) -> Row:
    health = {} if cell.experts is None else cell.experts.model_dump()
    absent = dict.fromkeys(("dead_fraction", "load_cv", "max_violation"))
    words = cell.coherence
    return {
        **cell.model_dump(exclude=LONG),
        **cell.budget.model_dump(),
        **absent,
        **health,
        "coherent": None if words is None else words.share,
        "coherent_untrained": None if words is None else words.untrained,
    }


def _by_seed(cells: Sequence[FinishedCell], seeds: Sequence[int]) -> Array:
    losses = {cell.seed: cell.losses()[0] for cell in cells}
    return np.stack([losses[seed] for seed in seeds])


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _require_comparable(cells: Sequence[FinishedCell]) -> None:
    """One cell for each recipe and seed, of equal settings but for the seed; scored alike."""
    known: dict[str, FinishedCell] = {}
    recipes: dict[str, FinishedCell] = {}
    for cell in cells:
        other = known.setdefault(cell.name, cell)
        if other is not cell:
            raise ConfigError(
                f"{other.run} and {cell.run} are both {cell.recipe} with seed {cell.seed}; give "
                "variants a name of their own (name=...)"
            )
        same = recipes.setdefault(cell.recipe, cell)
        documents = cell.settings["training"].get("batching") == "documents"
        free = MAY_DIFFER if documents else (*MAY_DIFFER, "training.micro_batch_size")
        key = first_difference(cell.settings, same.settings, free)
        if key is not None:
            raise ConfigError(f"{cell.run} and {same.run} are both {cell.recipe}, but {key}")
    for part, key in (("data", "sequence_length"), ("evaluation", "stride")):
        values = {cell.settings[part][key]: cell.run for cell in cells}
        if len(values) > 1:
            raise ConfigError(
                f"{part}.{key} differs, and with it what a perplexity means: {values}"
            )
    _require_equal(cells, "document_tokens", DataError, "were scored on different documents")
    analysed = [cell for cell in cells if cell.coherence is not None]
    _require_equal(analysed, "analysed", ConfigError, "were analysed on different text")


def _require_equal(
    cells: Sequence[FinishedCell], key: str, error: type[Exception], what: str
) -> None:
    values = {getattr(cell, key): cell.run for cell in cells}
    if len(values) > 1:
        raise error(
            f"the runs {what}: " + ", ".join(f"{run}: {str(v)[:40]}" for v, run in values.items())
        )
