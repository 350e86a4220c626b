"""`model.channel.backend=auto`: the fastest backend for this recipe on this machine, measured once.

Each backend installed here runs one routed layer of the recipe forward and backward in turn; the medians
are kept in the user's cache under everything they depend on.
"""

import hashlib
import importlib.metadata
import json
import platform
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from sra_ds.config import Recipe
from sra_ds.config.model import MoEChannelConfig
from sra_ds.files import user_cache
from sra_ds.moe.layer import build_backend
from sra_ds.moe.placement import BackendName, Placement
from sra_ds.moe.routing import Routing, route
from sra_ds.ops.extension import extension
from sra_ds.ops.kernel_build import library_name
from sra_ds.processes import from_first
from sra_ds.seeds import generator
from sra_ds.storage.run_dir import write_atomically
from sra_ds.timing import Work, in_turn, medians
from sra_ds.training import environment

ROUNDS = 7
MAX_TOKENS = 8192


class Choice(NamedTuple):
    """The fastest backend and the median milliseconds of each."""

    backend: BackendName
    milliseconds: dict[BackendName, float]
    measured_now: bool

    def reason(self) -> str:
        """For people."""
        times = ", ".join(f"{name} {value:.1f} ms" for name, value in self.milliseconds.items())
        when = "measured now" if self.measured_now else "measured before"
        return f"auto: {times} a layer, forward and backward ({when})"


def installed_backends(device: torch.device) -> list[BackendName]:
    """What can run on this device; MegaBlocks' kernels need a GPU."""
    names: list[BackendName] = ["local", "deepspeed"]
    if device.type == "cuda" and find_spec("megablocks"):
        names.append("megablocks")
    return names


def settle_placement(
    recipe: Recipe, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Placement, str]:
    """What `auto` stands for, for micro-batches of `tokens`, and why: rank 0 measures, all take its
    choice. Collective."""
    found = {"backend": "", "reason": ""}
    if environment.rank() == 0:
        choice = choose_backend(recipe, tokens, device, dtype)
        found = {"backend": choice.backend, "reason": choice.reason()}
    found = json.loads(from_first(json.dumps(found)))
    return Placement(cast(BackendName, found["backend"])), found["reason"]


def choose_backend(
    recipe: Recipe, tokens: int, device: torch.device, dtype: torch.dtype, cache: Path | None = None
) -> Choice:
    """Measure, or remember, for micro-batches of `tokens` on a process."""
    tokens = min(tokens, MAX_TOKENS)
    names = installed_backends(device)
    path = (cache or user_cache("backends")) / f"{_key(recipe, tokens, device, dtype, names)}.json"
    try:
        found = json.loads(path.read_text("utf-8"))
        if isinstance(found, dict) and set(found) == set(names):
            return Choice(min(names, key=lambda name: float(found[name])), found, False)
    except (OSError, ValueError):
        pass  # not measured yet
    milliseconds = _measure(recipe, tokens, device, dtype, names)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(milliseconds))
    return Choice(min(names, key=lambda name: milliseconds[name]), milliseconds, True)


def _measure(
    recipe: Recipe, tokens: int, device: torch.device, dtype: torch.dtype, names: list[BackendName]
) -> dict[BackendName, float]:
    """Median milliseconds of forward and backward, all backends in turn on the same routing."""
    channel, width = recipe.model.channel, recipe.model.width
    assert isinstance(channel, MoEChannelConfig)
    seeds = generator(0, "backend")
    x_TD = torch.randn(tokens, width, generator=seeds).to(device, dtype)
    scores_TE = torch.randn(tokens, channel.experts, generator=seeds).to(device)
    routing = route(scores_TE, channel.top_k, "selected")
    layers = {}
    for name in names:
        with torch.device("meta"):
            layer = build_backend(channel, width, Placement(name))
        layers[name] = layer.to_empty(device=device).to(dtype)
        for parameter in layers[name].parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    works: dict[str, Work] = {
        name: partial(_pass, layer, x_TD, routing) for name, layer in layers.items()
    }
    found = medians(in_turn(works, ROUNDS))
    return {name: found[name] for name in names}


def _pass(layer: torch.nn.Module, x_TD: torch.Tensor, routing: Routing) -> None:
    """Forward and backward."""
    layer(x_TD.detach().requires_grad_(), routing).float().sum().backward()


def _key(
    recipe: Recipe, tokens: int, device: torch.device, dtype: torch.dtype, names: list[BackendName]
) -> str:
    """Hash of everything the times depend on."""
    gpu = device.type == "cuda"
    what = torch.cuda.get_device_name(device) if gpu else platform.node()  # homes are shared
    versions = ["torch", "deepspeed", *(["megablocks"] if "megablocks" in names else [])]
    facts: dict[str, Any] = {
        "channel": recipe.model.channel.model_dump(mode="json"),
        "width": recipe.model.width,
        "tokens": tokens,
        "dtype": str(dtype),
        "device": [what, torch.get_num_threads()],
        "versions": [importlib.metadata.version(name) for name in versions],
        "kernels": library_name() if device.type in extension().devices else "reference",
        "names": names,
    }
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
