"""Perplexity with other numbers of experts than the model was trained for.

k-sweep      every router chooses k experts instead
drop curve   the least or most loaded experts of every layer are suppressed
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from sra_ds.config.steering import Steering, Suppress
from sra_ds.data.shards import TokenSplit
from sra_ds.evaluation.perplexity import evaluate
from sra_ds.evaluation.run import Scoring, setting
from sra_ds.inference.load import LoadedRun
from sra_ds.inference.steer import steered
from sra_ds.model.language_model import LanguageModel

MOST_K = 8
DROPPED_SHARES = (0.0, 0.125, 0.25, 0.5, 0.75)


def k_sweep(
    loaded: LoadedRun, split: TokenSplit, tokens: int, device: torch.device
) -> list[dict[str, float]]:
    """Loss in nats per token and perplexity for k = 1 .. 8, or as many experts as there are."""
    experts = min(router.slots for router in loaded.model.routers())
    rows = []
    for k in tqdm(range(1, min(MOST_K, experts) + 1), "k-sweep", leave=False):
        with choosing(loaded.model, k):
            rows.append({"k": k, **_score(loaded, split, tokens, device)})
    return rows


def drop_curve(
    loaded: LoadedRun,
    split: TokenSplit,
    load_LE: NDArray[np.int64],
    tokens: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The same with shares of the experts suppressed, as many in each layer, the least or the most loaded
    first."""
    order_LE = np.argsort(load_LE, axis=1, kind="stable")
    slots_L = [router.slots for router in loaded.model.routers()]
    experts, top_k = min(slots_L), loaded.model.routers()[0].top_k
    cases = [(first, s) for first in ("least", "most") for s in DROPPED_SHARES]
    rows = []
    for first, share in tqdm(cases, "dropping experts", leave=False):
        count = min(round(share * experts), experts - top_k)
        ranked_LE = order_LE if first == "least" else order_LE[:, ::-1]
        edits = tuple(
            Suppress(layer=layer, expert=int(expert))
            for layer, ranked_E in enumerate(ranked_LE)
            for expert in ranked_E[ranked_E < slots_L[layer]][:count]
        )
        with steered(loaded.model, Steering(name="drop", edits=edits)):
            found = _score(loaded, split, tokens, device)
        share = len(edits) / sum(slots_L)
        rows.append({"first": first, "dropped": count, "share": share, **found})
    return rows


@contextmanager
def choosing(model: LanguageModel, k: int) -> Iterator[None]:
    """Let every router choose k experts for a while."""
    routers = model.routers()
    before = [router.top_k for router in routers]
    try:
        for router in routers:
            router.top_k = k
        yield
    finally:
        for router, own in zip(routers, before, strict=True):
            router.top_k = own


def _score(
    loaded: LoadedRun, split: TokenSplit, tokens: int, device: torch.device
) -> dict[str, float]:
    result = evaluate(loaded.model, split, setting(loaded, Scoring(), device), tokens)
    assert result is not None
    summary = result.summary()
    return {name: float(summary[name]) for name in ("nll_per_token", "token_perplexity")}
