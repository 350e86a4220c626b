"""Experts of a model as files: for each its tensors and a card, see `export_card`.

The folder is complete or absent. Load and top tokens come from what the run knows (`export_load`).
"""

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sra_ds.config import Recipe
from sra_ds.files import file_sha256
from sra_ds.inference.export.card import Card, Load, shape_of, stem_of, write_card, write_tensors
from sra_ds.inference.export.loads import Loads, known_loads
from sra_ds.inference.export.rows import ANCHORS, State, read_rows
from sra_ds.inference.load import LoadedRun
from sra_ds.inference.places import Place, experts_of, parse_number, require_place, routed
from sra_ds.storage.checkpoint import WEIGHTS, read_manifest
from sra_ds.storage.run_dir import RunDir, complete_or_absent


def choose_places(recipe: Recipe, layer: int | None, experts: str | None) -> list[Place]:
    """The experts `--layer` and `--experts` name; all of what is left out. Raises `ConfigError`."""
    channel = routed(recipe)
    layers = range(recipe.model.layers) if layer is None else [layer]
    numbers = list(range(channel.experts))
    if experts is not None:
        asked = [parse_number(part, f"--experts {experts}") for part in experts.split(",")]
        numbers = sorted(set(asked))
    places = [Place(layer, number) for layer in layers for number in numbers]
    for place in places:
        require_place(experts_of(recipe), place, "--layer and --experts")
    return places


def export_experts(loaded: LoadedRun, places: list[Place], out: Path) -> dict[str, Any]:
    """Write tensors and card of each expert into a new folder; returns what was written. Raises
    `CheckpointError` for a run whose files are damaged."""
    state, loads = loaded.model.state_dict(), known_loads(loaded)
    with complete_or_absent(RunDir(out)) as new:
        stems = [
            _export(loaded, state, place, loads, new.path) for place in tqdm(places, "experts")
        ]
    awake = sum(router.awake for router in loaded.model.routers())
    if awake:
        print(f"ghosts are not exported: {awake} awake stayed behind", file=sys.stderr)
    if loads is None or loads.top_tokens is None:
        print(
            f"the cards name no top tokens: tools/analyze.py --run {loaded.run.path} finds them, "
            "then export again",
            file=sys.stderr,
        )
    counted_in = None if loads is None else loads.counted_in
    return {"out": str(out), "experts": len(stems), "load_from": counted_in, "files": stems}


def weight_hashes(checkpoint: Path) -> dict[str, str]:
    """Hash of each of a checkpoint's weight files, by its name."""
    files = read_manifest(checkpoint)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith(WEIGHTS)}


def _export(
    loaded: LoadedRun, state: State, place: Place, loads: Loads | None, folder: Path
) -> str:
    """Write one expert; its file name without ending."""
    shape = shape_of(loaded.recipe)
    rows = read_rows(state, loaded.recipe, place)
    stem = stem_of(place, shape.experts)
    tensors = folder / f"{stem}.safetensors"
    write_tensors(tensors, rows)
    card = Card(
        run=loaded.run.path.resolve().name,
        recipe=loaded.recipe.name,
        step=loaded.trainer["step"],
        weights_sha256=weight_hashes(loaded.checkpoint),
        model=shape,
        layer=place.layer,
        expert=place.expert,
        load=None if loads is None else _load(loads, place),
        top_tokens=None if loads is None else loads.tokens_of(place),
        anchor=tuple(rows[ANCHORS].tolist()) if ANCHORS in rows else None,
        file=tensors.name,
        sha256=file_sha256(tensors),
        tensors={name: tuple(row.shape) for name, row in rows.items()},
    )
    write_card(folder / f"{stem}.json", card)
    return stem


def _load(loads: Loads, place: Place) -> Load:
    routes = float(loads.routes_LE[place])
    return Load(share=loads.share(place), routes=routes, counted_in=loads.counted_in)
