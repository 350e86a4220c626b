"""Anchors over a run: seeded from data, given to dead experts anew, and how far they have moved.

Anchors are seeded once, before the first step, from the same batch on every rank: each layer's become
normalised router inputs. A forward pass never does it, so loading a checkpoint elsewhere cannot seed
again. An anchor is a router's row per expert, so the linear router's weight counts as anchors, too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sra_ds.data.loader import Batch
from sra_ds.errors import ConfigError
from sra_ds.metrics import anchor_drift
from sra_ds.model.language_model import LanguageModel
from sra_ds.moe.layer import MoELayer
from sra_ds.moe.routers import CosineRouter, LinearRouter
from sra_ds.seeds import generator
from sra_ds.storage.fragments import Fragment, TensorFiles, whole_tensor
from sra_ds.training.engine import read_parameter, write_parameter
from sra_ds.training.engine_state import START
from sra_ds.training.hooks import of_valid_tokens


@torch.no_grad()
def seed_anchors(model: LanguageModel, forward: nn.Module, batch: Batch, seed: int) -> None:
    """Replace the anchors of every cosine router, layer by layer, since a layer's input depends on the
    anchors before it. `forward` is the model or the engine around it. Collective."""
    for number, router in enumerate(model.routers()):
        (tokens_ND,) = router_inputs([router], forward, batch)
        if len(tokens_ND) < router.experts:
            raise ConfigError(
                f"anchors=data needs at least experts={router.experts} tokens in the first batch, "
                f"it has {len(tokens_ND)}; raise training.batch_size"
            )
        chosen = torch.randperm(len(tokens_ND), generator=generator(seed, "anchors", number))
        seeds_ED = tokens_ND[chosen[: router.experts].to(tokens_ND.device)]
        write_parameter(router.anchors, normalize(seeds_ED.float(), dim=-1))


@torch.no_grad()
def router_inputs(routers: Sequence[nn.Module], forward: nn.Module, batch: Batch) -> list[Tensor]:
    """What each router is given for the valid tokens of a batch, N x D, without dropout or noise.
    Collective."""
    inputs: list[Tensor] = []
    handles = [router.register_forward_pre_hook(_keep(inputs)) for router in routers]
    return of_valid_tokens(inputs, handles, forward, batch)


def _keep(inputs: list[Tensor]) -> Any:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        del module
        inputs.append(arguments[0])

    return hook


def learned_anchors(model: LanguageModel) -> dict[str, nn.Parameter]:
    """The anchors of routed layers that training moves, by the parameter's name, in order of the layers;
    none for routers that are frozen or have none."""
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, MoELayer):
            continue
        if isinstance(layer.router, CosineRouter):
            found[f"{name}.router.anchors"] = layer.router.anchors
        elif isinstance(layer.router, LinearRouter):
            found[f"{name}.router.weight"] = layer.router.weight
    return found


class AnchorDrift:
    """How far each layer's anchors are from where they were when the run began, which is where they are
    when this is made. Making and asking are collective."""

    def __init__(self, model: LanguageModel) -> None:
        self._anchors = learned_anchors(model)
        self._start: dict[str, Tensor] | None = self._now()

    def by_layer(self) -> list[float] | None:
        """`metrics.anchor_drift` of each layer; None without learned anchors, or if it is not known where
        they began."""
        if not (self._anchors and self._start):
            return None
        start = self._start
        return [anchor_drift(now_ED, start[name]) for name, now_ED in self._now().items()]

    def fragments(self) -> dict[str, Fragment]:
        """Where the anchors began, for a checkpoint."""
        start = self._start or {}
        return {f"{name}/{START}": whole_tensor(anchors_ED) for name, anchors_ED in start.items()}

    def load(self, files: TensorFiles) -> None:
        """Go on from what `fragments` gave; from files of a run that kept no such thing nothing is
        known."""
        paths = {name: f"{name}/{START}" for name in self._anchors}
        known = set(paths.values()) <= set(files.names)
        self._start = {n: files.read(path) for n, path in paths.items()} if known else None

    def _now(self) -> dict[str, Tensor]:
        """As the forward pass has them: below ZeRO-3 every process does, and nothing is sent."""
        return {name: _whole(anchors).cpu() for name, anchors in self._anchors.items()}


def _whole(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "ds_id"):  # ZeRO-3: spread over the processes
        return read_parameter(parameter)
    return parameter.detach().float().clone()
