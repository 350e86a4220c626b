"""How much each expert of a run was used, and for which tokens, from the files of the run.

    analysis.json                      of tools/analyze.py: load and top tokens
    routing/<step>.safetensors         routes per expert while training
    checkpoints/<step>/trainer.json    what the checkpoint remembers of its last steps

The first of these that is there, and of the same step as the checkpoint, counts. Letters: L layers, E
experts.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sra_ds.errors import CheckpointError
from sra_ds.inference.load import LoadedRun
from sra_ds.inference.places import Place, routed
from sra_ds.metrics import is_dead


class Loads(NamedTuple):
    """Routes per layer and expert, what says so, and the tokens an expert was chosen for most. Behind
    the experts may stand ghosts, with zeros where a layer's were asleep."""

    routes_LE: Tensor
    counted_in: str
    top_tokens: dict[Place, tuple[str, ...]] | None = None

    def tokens_of(self, place: Place) -> tuple[str, ...] | None:
        """The tokens an expert was chosen for most."""
        return None if self.top_tokens is None else self.top_tokens[place]

    def share(self, place: Place) -> float:
        """Of the routes of its layer."""
        routes_E = self.routes_LE[place.layer]
        return float(routes_E[place.expert] / routes_E.sum().clamp(min=1e-12))

    def dead(self, layer: int) -> list[int]:
        """Experts with fewer than 1e-4 of the layer's routes."""
        return is_dead(self.routes_LE[layer]).nonzero().flatten().tolist()

    def least_first(self, layer: int) -> list[int]:
        """All experts by rising load, ties by falling number."""
        falling_E = self.routes_LE[layer].sort(descending=True, stable=True).indices
        return falling_E.flip(0).tolist()


def known_loads(loaded: LoadedRun) -> Loads | None:
    """What the run tells; None if nothing. Raises `CheckpointError` for a damaged file."""
    run, channel, step = loaded.run, routed(loaded.recipe), loaded.trainer["step"]
    shape = (loaded.recipe.model.layers, channel.experts)
    most = channel.experts + channel.ghosts.count
    analysis, snapshot = run.analysis(step), run.routing / f"{step}.safetensors"
    if analysis is not None:
        found = _from_analysis(analysis, shape, most, loaded.trainer["top_k"])
        origin = run.analysis_file
    elif snapshot.is_file():
        origin, found = snapshot, _from_snapshot(snapshot)
    elif loaded.trainer.get("recent_load"):
        found = _from_trainer(loaded.trainer["recent_load"])
        origin = run.checkpoints / loaded.checkpoint.name / "trainer.json"
    else:
        return None
    if found is None or not _fits(found.routes_LE, shape, most):
        raise CheckpointError(
            f"{origin} does not tell the load of {shape[0]} x {shape[1]} experts; make it again or "
            "move it away"
        )
    return found._replace(counted_in=str(origin.relative_to(run.path)))


def _fits(routes_LE: Tensor, shape: tuple[int, int], most: int) -> bool:
    """Whether these are the routes of so many layers and experts, and of what there may be at most."""
    if routes_LE.dim() != 2 or len(routes_LE) != shape[0]:
        return False
    return shape[1] <= routes_LE.shape[1] <= most and bool((routes_LE >= 0).all())


def _from_analysis(
    found: dict[str, Any], shape: tuple[int, int], most: int, top_k: int
) -> Loads | None:
    """Routes and tokens of every expert; None where one is missing or malformed."""
    routes_LE = torch.zeros(shape[0], most, dtype=torch.float64)
    routes_LE[:, : shape[1]] = -1.0
    tokens: dict[Place, tuple[str, ...]] = {}
    try:
        routes = top_k * float(found["tokens"])
        for entry in found["experts"]:
            place = Place(int(entry["layer"]), int(entry["expert"]))
            routes_LE[place] = routes * float(entry["load"])
            tokens[place] = tuple(map(str, entry["top_tokens"]))
    except (LookupError, TypeError, ValueError):
        return None
    return Loads(routes_LE.round(), "", tokens)


def _from_snapshot(path: Path) -> Loads | None:
    try:
        return Loads(load_file(path)["load_LE"].double(), "")
    except (SafetensorError, OSError, LookupError):
        return None


def _from_trainer(buckets: Any) -> Loads | None:
    """The sum over the newest steps, each (tokens, routes per layer and expert)."""
    try:
        loads = [torch.tensor(load_LE, dtype=torch.float64) for _, load_LE in buckets]
        return Loads(torch.stack(loads).sum(0), "")
    except (TypeError, ValueError, RuntimeError):
        return None
