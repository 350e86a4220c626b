"""Models made of other models' experts, as run directories with weights alone.

    merge         exported experts where they came from, in the same run or another of the same shape
    transplant    one exported expert at another place
    write_run     the run directory, complete or absent

Every tool opens such a run, and training starts from it with `--init-from`; there is nothing to resume.
"""

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sra_ds.config import Recipe
from sra_ds.config.loading import validate
from sra_ds.errors import ConfigError
from sra_ds.inference.export.card import Exported, find_cards, read_export, require_fit
from sra_ds.inference.export.experts import weight_hashes
from sra_ds.inference.export.rows import State, row_names, write_rows
from sra_ds.inference.load import LoadedRun
from sra_ds.inference.places import Place, experts_of, require_place, routed
from sra_ds.storage.checkpoint import WEIGHTS, Contents, Layout, point_latest_at, save_parts
from sra_ds.storage.fragments import whole_tensor
from sra_ds.storage.run_dir import RunDir, complete_or_absent

OF_THE_CORPUS = ("corpus", "corpus_folder", "corpus_fingerprint", "tokenizer_sha256")


def merge(loaded: LoadedRun, exports: Path, out: Path) -> dict[str, Any]:
    """A run that has the experts of a folder, or of one card, where they came from; returns what was
    written. Raises `CheckpointError` for damaged exports and `ConfigError` for those of another shape."""
    experts: dict[Place, Exported] = {}
    for path in find_cards(exports):
        found = read_export(path)
        place = found.card.place
        if place in experts:
            raise ConfigError(f"{path} and {experts[place].path} are both of expert {place}")
        experts[place] = found
    return _write_with(loaded, experts, out, "merged")


def transplant(loaded: LoadedRun, export: Path, place: Place, out: Path) -> dict[str, Any]:
    """A run that has one exported expert at another place; errors as in `merge`."""
    cards = find_cards(export)
    if len(cards) > 1:
        raise ConfigError(f"{export} holds {len(cards)} experts; name the card of one")
    return _write_with(loaded, {place: read_export(cards[0])}, out, "transplanted")


def _write_with(
    loaded: LoadedRun, experts: Mapping[Place, Exported], out: Path, how: str
) -> dict[str, Any]:
    """A run with some experts replaced."""
    recipe, state = loaded.recipe, loaded.model.state_dict()
    for place, found in experts.items():
        require_place(experts_of(recipe), place, str(found.path))
        names = row_names(state, recipe, place.layer)
        require_fit(found, recipe, {n: tuple(state[name].shape[1:]) for n, name in names.items()})
    changed = write_rows(state, recipe, {place: found.rows for place, found in experts.items()})
    cards = {place: found.card for place, found in experts.items()}
    origins = {place: f"{card.run} step {card.step}" for place, card in cards.items()}
    told = {str(place): f"expert {cards[place].place} of {origins[place]}" for place in cards}
    write_run(loaded, renamed(recipe, how), changed, {"how": how, "experts": told}, out)
    return {"run": str(out), "experts": len(experts), "from": dict(Counter(origins.values()))}


def write_run(
    loaded: LoadedRun, recipe: Recipe, state: State, derived: dict[str, Any], out: Path
) -> None:
    """A run directory for weights made from those of `loaded`; `derived` says how."""
    experts = routed(recipe).experts
    trainer: dict[str, Any] = {
        k: loaded.trainer[k] for k in ("step", "tokens") if k in loaded.trainer
    }
    trainer["top_k"] = min(loaded.trainer["top_k"], experts)  # a schedule may fall to its end
    hashes = weight_hashes(loaded.checkpoint)
    derived = {**derived, "run": loaded.run.path.resolve().name, "weights_sha256": hashes}
    environment = loaded.run.environment()
    facts = {key: environment[key] for key in OF_THE_CORPUS if key in environment}
    tensors = {WEIGHTS: {name: whole_tensor(tensor) for name, tensor in state.items()}}
    told = {"step": trainer["step"], "derived": derived}
    with complete_or_absent(RunDir(out)) as new:
        new.write_start(recipe, {}, {**facts, "derived": derived})
        shutil.copyfile(loaded.run.tokenizer_file, new.tokenizer_file)
        folder = new.checkpoints / str(trainer["step"])
        save_parts(folder, [Contents(tensors, trainer, told, range(experts))], Layout())
        point_latest_at(folder)


def renamed(
    recipe: Recipe,
    how: str,
    channel: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of a derived model, with changed keys of `model.channel` and `training`. Its name is its
    own, since comparisons take runs of one name for seeds of one recipe."""
    tree = recipe.model_dump(mode="json")
    tree["name"] = f"{recipe.name.removesuffix(f'-{how}')}-{how}"
    tree["parallel"]["expert_parallel_size"] = 1
    tree["model"]["channel"] |= channel or {}
    tree["training"] |= training or {}
    return validate(tree)
