"""Which experts tell two sets of texts apart: contrastive risk difference.

For each expert the share of tokens routed to it in one set, less that in the other. Texts are the units:
the interval resamples them, and p permutes their labels, adjusted over all experts of all layers.
Letters: X texts, L layers, E experts, R draws.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from sra_ds.analysis.statistics import benjamini_hochberg
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import DataError
from sra_ds.inference.generate import left_padded
from sra_ds.inference.load import LoadedRun

DRAWS = 999
SEED = 0
BATCH_TEXTS = 16

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
    value_LE = risk_difference(counts_XLE, tokens_X, first_X)
    rng = np.random.default_rng(SEED)
    beyond_LE = np.zeros(value_LE.shape)
    resampled_RLE = np.empty((DRAWS, *value_LE.shape), np.float32)
    groups = [np.flatnonzero(first_X), np.flatnonzero(~first_X)]
    for draw in tqdm(range(DRAWS), "resampling", leave=False):
        permuted_LE = risk_difference(counts_XLE, tokens_X, rng.permutation(first_X))
        beyond_LE += np.abs(permuted_LE) >= np.abs(value_LE) - 1e-12
        drawn = np.concatenate([rng.choice(group, len(group)) for group in groups])
        resampled_RLE[draw] = risk_difference(counts_XLE[drawn], tokens_X[drawn], first_X)
    there_LE = ~np.isnan(value_LE)
    p_LE = np.where(there_LE, (1 + beyond_LE) / (1 + DRAWS), np.nan)
    adjusted_LE = np.array(benjamini_hochberg(p_LE.ravel().tolist())).reshape(p_LE.shape)
    low_LE, high_LE = np.quantile(resampled_RLE, [0.025, 0.975], axis=0)
    order = np.argsort(-np.abs(value_LE), axis=None, kind="stable")[: there_LE.sum()]
    rows = []
    for layer, expert in zip(*np.unravel_index(order, value_LE.shape), strict=True):
        at = (layer, expert)
        rows.append(
            {
                "layer": int(layer),
                "expert": int(expert),
                "risk_difference": float(value_LE[at]),
                "low": float(low_LE[at]),
                "high": float(high_LE[at]),
                "p": float(p_LE[at]),
                "p_adjusted": float(adjusted_LE[at]),
            }
        )
    return rows


def risk_difference(counts_XLE: Floats, tokens_X: Floats, first_X: NDArray[np.bool_]) -> Floats:
    """Routes per token of the first texts less those of the others, L x E."""
    shares = [
        np.tensordot(own.astype(np.float64), counts_XLE, 1) / max(float(tokens_X[own].sum()), 1.0)
        for own in (first_X, ~first_X)
    ]
    difference_LE: Floats = shares[0] - shares[1]
    return difference_LE
