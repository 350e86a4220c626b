"""Matched comparison of recipes: same tokens, same order, several seeds, one file per finished cell.

A cell is (recipe with overrides, seed) with its own run directory; one that has a summary is not run
again, one that was interrupted is resumed. Differences are judged by a paired bootstrap over validation
documents, since documents differ far more from each other than models do.
"""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from sra_ds.config import load_recipe
from sra_ds.errors import ConfigError, DataError, TrainingError
from sra_ds.evaluation.experts import last_specialisation
from sra_ds.model.counting import live_share
from sra_ds.model.flops import flops_per_token
from sra_ds.model.language_model import build_model
from sra_ds.storage.run_dir import RunDir, open_run, read_json, write_atomically

RESAMPLES = 10_000


class Cell(NamedTuple):
    """A recipe with overrides, under a name of its own."""

    name: str
    recipe: str
    overrides: list[str]


def cells_of(recipes: list[str], overrides: list[str]) -> list[Cell]:
    """One cell per recipe, with common overrides."""
    return [Cell(Path(recipe).stem, recipe, overrides) for recipe in recipes]


def read_sweep(name_or_file: str, overrides: list[str]) -> list[Cell]:
    """The variants of a sweep: a YAML file, or one shipped as `sra_ds/recipes/sweeps/NAME.yaml`, with a
    `recipe` and `variants`, each a name and its overrides. Raises `ConfigError`."""
    path, shipped = Path(name_or_file), Path(str(resources.files("sra_ds") / "recipes" / "sweeps"))
    if path.suffix not in (".yaml", ".yml"):
        path = shipped / f"{name_or_file}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(found.stem for found in shipped.glob("*.yaml")))
        raise ConfigError(f"no sweep {name_or_file!r}: shipped are {names}, or a .yaml file")
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
        base, variants = str(tree["recipe"]), dict(tree["variants"])
        return [
            Cell(name, base, [f"name={name}", *map(str, own), *overrides])
            for name, own in variants.items()
        ]
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path}: a sweep has `recipe: NAME` and `variants: {{name: [key.path=value, ...]}}`"
        ) from None


def run_cells(cells: list[Cell], seeds: list[int], out: Path, launch: list[str]) -> list[Path]:
    """Train every cell that is not finished; `launch` is the command that trains one run."""
    for cell in cells:
        load_recipe(cell.recipe, cell.overrides)  # a misspelt key fails before hours of training
    runs = []
    for seed, cell in tqdm([(seed, cell) for seed in seeds for cell in cells], "cells"):
        run = RunDir(out / f"{cell.name}-s{seed}")
        asked = [*cell.overrides, f"training.seed={seed}"]
        if run.recipe_file.is_file() and run.recipe() != load_recipe(cell.recipe, asked):
            raise ConfigError(
                f"{run.path} holds a run of other settings; choose another --out or delete it"
            )
        if not run.summary_file.is_file():
            _train_cell(run, cell.recipe, asked, launch)
        runs.append(run.path)
    return runs


def compare_runs(
    paths: list[Path], draw: Callable[[list[dict[str, Any]], Path], None], out: Path
) -> dict[str, Any]:
    """Table, CSV, JSON and figure of finished runs. Raises `DataError` when their text differs and
    `ConfigError` when their budgets do."""
    runs = [open_run(path) for path in paths]
    cells = [_read_cell(run) for run in runs]
    _require_equal(cells, "corpus_fingerprint", DataError, "were trained on different text")
    for seed in {cell["seed"] for cell in cells}:  # documents fill budgets differently by seed
        own = [cell for cell in cells if cell["seed"] == seed]
        _require_equal(own, "tokens", ConfigError, "saw different numbers of tokens")
    _require_distinct(cells)
    out.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        write_atomically(
            out / f"cell-{cell['recipe']}-s{cell['seed']}.json", json.dumps(cell, indent=1)
        )
    rows = [_row(recipe, cells) for recipe in dict.fromkeys(cell["recipe"] for cell in cells)]
    documents = {run.path: _documents(run) for run in runs}
    by_recipe = {
        row["recipe"]: [documents[Path(c["run"])] for c in cells if c["recipe"] == row["recipe"]]
        for row in rows
    }
    first = rows[0]["recipe"]
    differences = [
        {
            "recipe": row["recipe"],
            "against": first,
            **paired_bootstrap(by_recipe[row["recipe"]], by_recipe[first]),
        }
        for row in rows[1:]
    ]
    result = {"rows": rows, "differences": differences, "cells": cells}
    write_atomically(out / "comparison.json", json.dumps(result, indent=1))
    write_atomically(out / "comparison.md", markdown(rows, differences))
    with (out / "comparison.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(cells[0]))
        writer.writeheader()
        writer.writerows(cells)
    draw(rows, out)
    return result


def paired_bootstrap(
    ours: list[tuple[NDArray[Any], NDArray[Any]]], theirs: list[tuple[NDArray[Any], NDArray[Any]]]
) -> dict[str, float]:
    """Difference in nats per token (ours - theirs, mean over seeds) with its 95 % interval over
    documents, and the share of resamples in which ours is lower."""
    nll = np.mean([d[0] for d in ours], axis=0) - np.mean([d[0] for d in theirs], axis=0)
    tokens = ours[0][1]
    rng = np.random.default_rng(0)
    even = np.full(len(nll), 1 / len(nll))
    resampled = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        counts = rng.multinomial(len(nll), even)  # how often each document was drawn
        resampled[number] = counts @ nll / (counts @ tokens)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {
        "nats_per_token": float(nll.sum() / tokens.sum()),
        "low": float(low),
        "high": float(high),
        "share_lower": float((resampled < 0).mean()),
    }


def markdown(rows: list[dict[str, Any]], differences: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        "| recipe | seeds | token perplexity | word perplexity | bits per byte | accuracy "
        "| dead experts | specialisation | tokens/s | MFLOP a token |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = _spread(row["token_perplexity_sd"], ".2f")
        dead = "–" if row["dead_fraction"] is None else f"{row['dead_fraction']:.1%}"
        apart = "–"
        if row["specialisation_mean"] is not None:
            apart = f"{row['specialisation_mean']:.3f}{_spread(row['specialisation_sd'], '.3f')}"
        lines.append(
            f"| {row['recipe']} | {len(row['seeds'])} | {row['token_perplexity_mean']:.2f}{spread} | "
            f"{row['word_perplexity_mean']:.1f} | {row['bits_per_byte_mean']:.4f} | "
            f"{row['accuracy_mean']:.2%} | {dead} | {apart} | {row['tokens_per_second_mean']:,.0f} | "
            f"{row['flops_per_token_mean'] / 1e6:.1f} |"
        )
    lines.append("")
    for d in differences:
        lines.append(
            f"{d['recipe']} minus {d['against']}: {d['nats_per_token']:+.4f} nats per token "
            f"[{d['low']:+.4f}, {d['high']:+.4f}] (95 %, paired bootstrap over documents)"
        )
    return "\n".join(lines) + "\n"


def _spread(deviation: float | None, form: str) -> str:
    return "" if deviation is None else f" ± {deviation:{form}}"


def _train_cell(run: RunDir, recipe: str, overrides: list[str], launch: list[str]) -> None:
    command = [*launch, "--run", str(run.path)]
    if (run.checkpoints / "latest").is_file():
        command += ["--resume"]
    else:
        command += ["--recipe", recipe, *overrides]
    code = subprocess.run(command, check=False, stdout=sys.stderr).returncode
    if code or not run.summary_file.is_file():
        raise TrainingError(f"cell {run.path} did not finish (exit {code}); call again to go on")


def _read_cell(run: RunDir) -> dict[str, Any]:
    if not run.summary_file.is_file():
        raise ConfigError(f"{run.path} has no summary.json: the run is not finished")
    summary, recipe = read_json(run.summary_file), run.recipe()
    experts = summary["experts"] or {}
    model = build_model(recipe, "meta")
    figures = ("token_perplexity", "word_perplexity", "bits_per_byte", "accuracy", "nll_per_token")
    return {
        "recipe": recipe.name,
        "seed": recipe.training.seed,
        "run": str(run.path),
        **{name: summary["validation"][name] for name in figures},
        "dead_fraction": experts.get("dead_fraction"),
        "specialisation": (last_specialisation(run.metrics()) or {}).get("mean"),
        "tokens": summary["tokens"],
        "seconds": summary["seconds"],
        "tokens_per_second": summary["tokens_per_second"],
        "parameters": summary["params"]["total"],
        "active": summary["params"]["active"],
        "flops_per_token": flops_per_token(model, recipe.data.sequence_length),
        "live_share": live_share(model),
        "device": summary["device"],
        "corpus_fingerprint": summary["corpus_fingerprint"],
    }


def _row(recipe: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    own = [cell for cell in cells if cell["recipe"] == recipe]
    values = [cell["token_perplexity"] for cell in own]
    dead = [cell["dead_fraction"] for cell in own if cell["dead_fraction"] is not None]
    apart = [cell["specialisation"] for cell in own if cell["specialisation"] is not None]
    means = ("word_perplexity", "bits_per_byte", "accuracy", "tokens_per_second", "flops_per_token")
    return {
        "recipe": recipe,
        "seeds": [cell["seed"] for cell in own],
        "token_perplexities": values,
        "token_perplexity_mean": mean(values),
        "token_perplexity_sd": stdev(values) if len(values) > 1 else None,
        "dead_fraction": mean(dead) if dead else None,
        "specialisation_mean": mean(apart) if apart else None,
        "specialisation_sd": stdev(apart) if len(apart) > 1 else None,
        "live_share": own[0]["live_share"],
        **{f"{name}_mean": mean(cell[name] for cell in own) for name in means},
    }


def _documents(run: RunDir) -> tuple[NDArray[Any], NDArray[Any]]:
    path = run.evaluation / "valid_documents.npz"
    if not path.is_file():
        raise DataError(f"{path} is missing: the run has no per-document losses")
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["nll"], arrays["tokens"]


def _require_distinct(cells: list[dict[str, Any]]) -> None:
    owners: dict[tuple[str, int], str] = {}
    for cell in cells:
        other = owners.setdefault((cell["recipe"], cell["seed"]), cell["run"])
        if other != cell["run"]:
            raise ConfigError(
                f"{other} and {cell['run']} are both {cell['recipe']} with seed {cell['seed']}; give "
                "variants a name of their own (name=...)"
            )


def _require_equal(
    cells: list[dict[str, Any]], key: str, error: type[Exception], what: str
) -> None:
    values = {cell[key]: cell["run"] for cell in cells}
    if len(values) > 1:
        raise error(
            f"the runs {what}: " + ", ".join(f"{run}: {str(v)[:12]}" for v, run in values.items())
        )
