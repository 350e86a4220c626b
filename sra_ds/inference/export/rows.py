"""Which tensors of a routed layer hold one row per expert, and reading and writing such rows.

    blocks.<layer>.channel.moe.backend.experts.up_weight   E x D x F    experts.up_weight   D x F
    blocks.<layer>.channel.moe.router.anchors              E x D        router.anchors      D
    ... every other tensor of the experts and, where it has an entry per expert, of the router

On the left names and shapes in a model, on the right those of one expert. A temperature that all experts
share and a shared expert belong to none. Letters: E experts, D width, F hidden width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sra_ds.config import Recipe
from sra_ds.config.model import CosineRouterConfig, GeluConfig, MoEChannelConfig
from sra_ds.errors import CheckpointError, ConfigError
from sra_ds.inference.places import Place, routed

State = dict[str, Tensor]
ANCHORS = "router.anchors"


def row_names(state: State, recipe: Recipe, layer: int) -> dict[str, str]:
    """Name of a row -> name of the tensor that holds it, for one layer."""
    channel, prefix = routed(recipe), f"blocks.{layer}.channel.moe."
    router = channel.router
    own = isinstance(router, CosineRouterConfig) and router.temperature == "per_expert"
    names = {}
    for name in state:
        short = name.removeprefix(prefix).removeprefix("backend.")
        shared = (short == "router.temperature" and not own) or short.startswith("router.ghost")
        if name.startswith(prefix) and short.startswith(("experts.", "router.")) and not shared:
            names[short] = name
    for name in names.values():
        if len(state[name]) != channel.experts:
            raise ConfigError(
                f"{name} has not one row for each of the {channel.experts} experts; experts of a "
                f"{router.kind} router cannot be taken apart"
            )
    return names


def read_rows(state: State, recipe: Recipe, place: Place) -> State:
    """The tensors of one expert, copied to the CPU; raises `CheckpointError` if one is not finite."""
    rows = {
        short: state[name][place.expert].detach().cpu().clone()
        for short, name in row_names(state, recipe, place.layer).items()
    }
    for short, row in rows.items():
        if not row.isfinite().all():
            raise CheckpointError(f"{short} of expert {place} is not finite; choose another step")
    return rows


def write_rows(state: State, recipe: Recipe, experts: Mapping[Place, State]) -> State:
    """A state with the rows of some experts replaced; the tensors given stay as they are."""
    changed = dict(state)
    for layer in {place.layer for place in experts}:
        for short, name in row_names(state, recipe, layer).items():
            changed[name] = state[name].clone()
            for place, rows in experts.items():
                if place.layer == layer:
                    changed[name][place.expert] = rows[short]
    return changed


def keep_rows(state: State, recipe: Recipe, kept_LK: list[list[int]]) -> State:
    """A state with only the named experts of each layer, in that order."""
    changed = dict(state)
    for layer, kept in enumerate(kept_LK):
        for name in row_names(state, recipe, layer).values():
            changed[name] = state[name][torch.tensor(kept, device=state[name].device)]
    return changed


def has_bias(channel: MoEChannelConfig) -> bool:
    """Whether the experts have biases."""
    return isinstance(channel.expert, GeluConfig) and channel.expert.bias
