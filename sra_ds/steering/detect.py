"""Which experts tell two sets of texts apart: contrastive risk difference.

For each expert the share of tokens routed to it in one set, less that in the other. Texts are the units:
the interval resamples them, and p permutes their labels, adjusted over all experts of all layers.
Letters: X texts, L layers, E experts, P experts of all layers, R draws.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from sra_ds.analysis.statistics import MANY_RESAMPLES, benjamini_hochberg, draws_of_null
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import DataError
from sra_ds.inference.generate import left_padded
from sra_ds.inference.load import LoadedRun

SEED = 0
BATCH_TEXTS = 16
DRAWS_AT_ONCE = 1000

Floats = NDArray[np.float64]


def read_texts(path: Path) -> list[str]:
    """Texts of a file, one a line, empty lines left out. Raises `DataError`."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}); convert it first") from None
    texts = [line for line in lines if line.strip()]
    if len(texts) < 2:
        raise DataError(f"{path}: needs at least two texts, one a line; it has {len(texts)}")
    return texts


@torch.no_grad()
def routes_of_texts(loaded: LoadedRun, texts: Sequence[str]) -> tuple[Floats, Floats]:
    """Routes of each text to each expert, X x L x E, and its tokens. A text longer than the model's
    window is cut there; the mark that opens it is not counted. NaN for an expert that a layer lacks and
    another has (a ghost that is awake)."""
    length, end = loaded.recipe.data.sequence_length, end_of_text_id(loaded.tokenizer)
    rows = [[end, *loaded.tokenizer.encode(text).ids][:length] for text in texts]
    slots_L = [router.slots for router in loaded.model.routers()]
    counts_XLE = np.full((len(rows), len(slots_L), max(slots_L)), np.nan)
    device = next(loaded.model.parameters()).device
    for start in tqdm(range(0, len(rows), BATCH_TEXTS), "routing texts", leave=False):
        own = rows[start : start + BATCH_TEXTS]
        ids_BT, valid_BT = (part.to(device) for part in left_padded(own, end))
        counted_BT = (valid_BT & (ids_BT != end)).cpu().numpy()
        routings = loaded.model.encode(ids_BT, valid_BT=valid_BT)[1].routings
        for layer, routing in enumerate(routings):
            ids_BTK = routing.expert_ids_TK.view(*ids_BT.shape, -1).cpu().numpy()
            for row, (ids_TK, counted_T) in enumerate(zip(ids_BTK, counted_BT, strict=True)):
                found_E = np.bincount(ids_TK[counted_T].ravel(), minlength=slots_L[layer])
                counts_XLE[start + row, layer, : len(found_E)] = found_E
    return counts_XLE, np.array([max(len(row) - 1, 0) for row in rows], np.float64)


def detect(
    loaded: LoadedRun, with_it: Sequence[str], without: Sequence[str]
) -> list[dict[str, Any]]:
    """Experts by how much more often a token of the first set goes to them, the largest difference in
    either direction first. Raises `DataError` for a dense model."""
    if not loaded.model.routers():
        raise DataError(f"{loaded.run.path}: the model has no routed layers; nothing to detect")
    counts_XLE, tokens_X = routes_of_texts(loaded, [*with_it, *without])
    return rank(counts_XLE, tokens_X, np.arange(len(tokens_X)) < len(with_it))


def rank(counts_XLE: Floats, tokens_X: Floats, first_X: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """What `detect` says, from the routes of the texts and which of them are of the first set."""
    texts, _, experts = counts_XLE.shape
    place_P = np.flatnonzero(~np.isnan(counts_XLE[0]))
    counts_XP = counts_XLE.reshape(texts, -1)[:, place_P]
    value_P = risk_difference(counts_XP, tokens_X, first_X)
    rng = np.random.default_rng(SEED)
    draws, beyond_P = draws_of_null(len(place_P)), np.zeros(len(place_P))
    for start in tqdm(range(0, draws, DRAWS_AT_ONCE), "resampling", leave=False):
        own_RX = np.tile(first_X, (min(DRAWS_AT_ONCE, draws - start), 1))
        permuted_RP = risk_difference(counts_XP, tokens_X, rng.permuted(own_RX, axis=1))
        beyond_P += (np.abs(permuted_RP) >= np.abs(value_P) - 1e-12).sum(0)
    p_P = (1 + beyond_P) / (1 + draws)
    adjusted_P = benjamini_hochberg(p_P.tolist())
    first_RX, others_RX = (
        rng.multinomial(own_X.sum(), own_X / own_X.sum(), MANY_RESAMPLES)
        for own_X in (first_X, ~first_X)
    )
    resampled_RP = _shares(counts_XP, tokens_X, first_RX) - _shares(counts_XP, tokens_X, others_RX)
    low_P, high_P = np.quantile(resampled_RP, [0.025, 0.975], axis=0)
    return [
        {
            "layer": int(place_P[at] // experts),
            "expert": int(place_P[at] % experts),
            "risk_difference": float(value_P[at]),
            "low": float(low_P[at]),
            "high": float(high_P[at]),
            "p": float(p_P[at]),
            "p_adjusted": adjusted_P[at],
        }
        for at in np.argsort(-np.abs(value_P), kind="stable")
    ]


def risk_difference(counts_XP: Floats, tokens_X: Floats, first_X: NDArray[np.bool_]) -> Floats:
    """Routes per token of the first texts less those of the others, for one choice of the first texts
    or for each row of many."""
    return _shares(counts_XP, tokens_X, first_X) - _shares(counts_XP, tokens_X, ~first_X)


def _shares(counts_XP: Floats, tokens_X: Floats, times_X: NDArray[Any]) -> Floats:
    """Routes per token of texts that are taken so many times each."""
    tokens: Floats = (times_X @ tokens_X)[..., None].clip(min=1)
    return times_X @ counts_XP / tokens
