"""Models with fewer experts: dead ones, the least used, or named ones are left out.

Every layer of a model has the same number of experts, so the layer that keeps most decides how many all
keep; a layer with more dead experts than it may lose keeps its most used dead ones.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from sra_ds.config import Recipe
from sra_ds.config.model import HashRouterConfig
from sra_ds.errors import ConfigError
from sra_ds.inference.export.loads import Loads, known_loads
from sra_ds.inference.export.rows import keep_rows
from sra_ds.inference.export.runs import renamed, write_run
from sra_ds.inference.load import LoadedRun
from sra_ds.inference.places import experts_of, parse_number, parse_place, require_place, routed

FEW_TOKENS = 1_000_000
"""Below this a rate of 1e-4 can hardly be told from zero."""


class Pruning(NamedTuple):
    """Experts to leave out by layer, and dead ones that stay because another layer has fewer."""

    gone: list[list[int]]
    spared: list[list[int]]


def prune(loaded: LoadedRun, which: str, out: Path) -> dict[str, Any]:
    """A run whose model lacks `which` experts: `dead`, `least:N` of each layer, or `L:E,L:E,...`; returns
    what went. Raises `ConfigError` where that leaves no valid model."""
    recipe = loaded.recipe
    channel = routed(recipe)
    if isinstance(channel.router, HashRouterConfig):
        raise ConfigError(
            "experts of a hash router cannot go: every token would change its experts"
        )
    for part, there in (
        (f"coupling={channel.coupling.kind}", channel.coupling.kind != "none"),
        (f"ghosts.count={channel.ghosts.count}", channel.ghosts.count > 0),
    ):
        if there:
            raise ConfigError(
                f"experts of layers with model.channel.{part} cannot go: others know them by number"
            )
    gone, spared = choose(loaded, which)
    kept = [[e for e in range(channel.experts) if e not in own] for own in gone]
    left = len(kept[0])
    if left < channel.top_k:
        raise ConfigError(
            f"--prune {which} leaves {left} experts a layer, fewer than the {channel.top_k} a token "
            "goes to (model.channel.top_k)"
        )
    pruned = smaller_recipe(recipe, left)
    state = keep_rows(loaded.model.state_dict(), recipe, kept)
    layers = {f"layer {layer}": _listed(own) for layer, own in enumerate(gone)}
    write_run(loaded, pruned, state, {"how": "pruned", "asked": which, "gone": layers}, out)
    _warn_of_shares(pruned, left)
    before = {name: tensor.numel() for name, tensor in loaded.model.named_parameters()}
    told = {
        "run": str(out),
        "experts_per_layer": {"before": channel.experts, "after": left},
        "parameters": {
            "before": sum(before.values()),
            "after": sum(state[name].numel() for name in before),
        },
        "gone": layers,
    }
    kept_dead = {f"layer {layer}": _listed(own) for layer, own in enumerate(spared) if own}
    return {**told, "dead_but_kept": kept_dead} if kept_dead else told


def choose(loaded: LoadedRun, which: str) -> Pruning:
    """The experts to leave out, equally many in each layer; raises `ConfigError`."""
    layers, experts = loaded.recipe.model.layers, routed(loaded.recipe).experts
    option = f"--prune {which}"
    if ":" in which and not which.startswith("least:"):
        return Pruning(_named(loaded.recipe, which, option), [])
    if which != "dead" and not which.startswith("least:"):
        raise ConfigError(f"{option}: expected dead, least:N or LAYER:EXPERT,LAYER:EXPERT,...")
    loads = known_loads(loaded)
    if loads is None:
        raise ConfigError(
            f"{option}: nothing in {loaded.run.path} tells how much its experts are used; name them "
            "as LAYER:EXPERT, or run tools/analyze.py first"
        )
    _warn_of_few_tokens(loads, loaded.trainer["top_k"])
    if which == "dead":
        return _dead(loads, layers, option)
    number = parse_number(which.removeprefix("least:"), option)
    if not 0 < number < experts:
        raise ConfigError(
            f"{option}: there are {experts} experts in a layer; name 1 to {experts - 1}"
        )
    return Pruning([sorted(loads.least_first(layer)[:number]) for layer in range(layers)], [])


def smaller_recipe(recipe: Recipe, experts: int) -> Recipe:
    """The recipe with fewer experts; a schedule of experts per token stays within them."""
    knots = [(at, min(k, experts)) for at, k in recipe.training.top_k_schedule]
    return renamed(recipe, "pruned", {"experts": experts}, {"top_k_schedule": knots})


def _named(recipe: Recipe, which: str, option: str) -> list[list[int]]:
    """Named experts by layer."""
    gone: list[set[int]] = [set() for _ in range(recipe.model.layers)]
    for part in which.split(","):
        place = parse_place(part, "--prune")
        require_place(experts_of(recipe), place, option)
        gone[place.layer].add(place.expert)
    counts = [len(own) for own in gone]
    if len(set(counts)) > 1:
        raise ConfigError(
            f"{option}: all layers keep the same number of experts, but layers 0 to "
            f"{len(counts) - 1} would lose {', '.join(map(str, counts))}; name as many in each"
        )
    return [sorted(own) for own in gone]


def _dead(loads: Loads, layers: int, option: str) -> Pruning:
    """As many dead experts of each layer as the layer with the fewest has."""
    dead = [set(loads.dead(layer)) for layer in range(layers)]
    fewest = min(range(layers), key=lambda layer: len(dead[layer]))
    number = len(dead[fewest])
    if not number:
        raise ConfigError(
            f"{option}: layer {fewest} has no dead expert ({loads.counted_in}), and all layers keep "
            "the same number; least:N leaves out the least used"
        )
    gone, spared = [], []
    for layer, own in enumerate(dead):
        ordered = [expert for expert in loads.least_first(layer) if expert in own]
        gone.append(sorted(ordered[:number]))
        spared.append(sorted(ordered[number:]))
    return Pruning(gone, spared)


def _warn_of_few_tokens(loads: Loads, top_k: int) -> None:
    tokens = float(loads.routes_LE[0].sum()) / top_k
    if tokens < FEW_TOKENS:
        print(
            f"{loads.counted_in} tells the load over {tokens:,.0f} tokens; with fewer than a million a "
            "rarely used expert may look dead",
            file=sys.stderr,
        )


def _warn_of_shares(recipe: Recipe, experts: int) -> None:
    """Balance losses in absolute shares meant another number of experts."""
    balance = recipe.losses.balance
    for name in ("high", "ceiling"):
        limit = getattr(balance, name, None)
        if limit is not None and limit * experts < 1:
            print(
                f"losses.balance.{name}={limit} lies below the even share of {experts} experts, "
                f"{1 / experts:.4f}: raise it before you train on",
                file=sys.stderr,
            )


def _listed(experts: list[int]) -> str:
    return " ".join(map(str, experts))
