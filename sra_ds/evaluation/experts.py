"""Expert health of a trained model: load over many tokens and dead experts at both definitions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from sra_ds.data.loader import TrainingWindows
from sra_ds.evaluation.perplexity import Model
from sra_ds.metrics import layers_summary, stacked_loads


@torch.no_grad()
def load_over_tokens(
    model: Model,
    windows: TrainingWindows,
    load_LE: NDArray[np.float64],
    tokens: int,
    wanted: int,
    batch_size: int,
    device: torch.device,
) -> tuple[NDArray[np.float64], int]:
    """Add training windows to the load of an evaluation until `wanted` tokens are seen; a rate of 1e-4
    cannot be told from zero on fewer than a million. Returns (load, tokens seen)."""
    missing = min(max(0, wanted - tokens), windows.count * windows.length)
    steps = -(-missing // (batch_size * windows.length))
    for step in tqdm(range(steps), "expert health", leave=False):
        batch = windows.batch(step, batch_size)
        routings = model(*batch.to(device)).routings
        load_LE = load_LE + stacked_loads([r.load_E for r in routings]).numpy()
        tokens += batch.ids_BT.numel()
    return load_LE, tokens


def health(
    load_LE: NDArray[np.float64], tokens: int, slots_L: Sequence[int] | None = None
) -> dict[str, Any]:
    """Per layer and over all layers; `dead_by_routes` is the published v1 definition (below 1e-4 of the
    layer's routes), `dead_by_tokens` v2's (chosen by fewer than 1e-4 of the tokens)."""
    found = layers_summary(torch.from_numpy(load_LE), tokens, slots_L)
    return {"tokens": tokens, "enough_tokens": tokens >= 1_000_000, **found}


def last_specialisation(metrics: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The last measurement in the metrics of a run, by layer and their mean; None if there is none."""
    measured = [line["specialisation"]["scores"] for line in metrics if "specialisation" in line]
    if not measured:
        return None
    return {"mean": sum(measured[-1]) / len(measured[-1]), "by_layer": measured[-1]}
