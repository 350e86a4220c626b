"""Where the anchors lie: their cosines, the room they span, and the vocabulary nearest to them.

For a linear router its rows stand for anchors. Anchors live among the vectors a router is given, so a
token is compared with them as that layer's norm of its embedding: what the router would see of it without
any context. Nearest is not the same as routed. Letters: L layers, E experts, D width, V token types.
"""

import importlib.util
import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from sra_ds.analysis.statistics import PERMUTATIONS, Floats, Measured, measured
from sra_ds.errors import BackendUnavailable
from sra_ds.model.language_model import LanguageModel
from sra_ds.moe.routers import anchor_rows

SEED = 0


class AnchorSpace(NamedTuple):
    """Unit vectors of one layer, in the same space."""

    anchors_ED: Tensor
    vocabulary_VD: Tensor


@torch.no_grad()
def anchor_spaces(model: LanguageModel, vocabulary: int) -> list[AnchorSpace]:
    """One per routed layer that has anchors; the first `vocabulary` ids are those of the tokenizer."""
    device = next(model.parameters()).device
    ids = torch.arange(vocabulary, device=device)
    embedded_1VD, _ = model.embedding(ids[None], torch.zeros_like(ids[None]))
    embedded_VD = embedded_1VD.squeeze(0)
    spaces = []
    for block, router in zip(model.blocks, model.routers(), strict=True):
        rows_ED = anchor_rows(router)
        if rows_ED is not None:
            seen_VD = block.channel_norm(embedded_VD)  # type: ignore[operator]
            pair = (normalize(part.float(), dim=-1).cpu() for part in (rows_ED, seen_VD))
            spaces.append(AnchorSpace(*pair))
    return spaces


def nearest_tokens(space: AnchorSpace, top: int) -> tuple[list[list[int]], Floats]:
    """For each expert the ids of largest cosine with its anchor, and those cosines, E x top."""
    cosines, ids = (space.anchors_ED @ space.vocabulary_VD.T).topk(top, dim=1)
    return ids.tolist(), cosines.double().numpy()


def geometry(anchors_ED: Tensor) -> dict[str, Measured]:
    """Dispersion and rank of unit anchors beside those of random directions. Chance is the value for
    independent uniform directions: E|cos| = sqrt(2 / (pi D)) to first order."""
    experts, width = anchors_ED.shape
    if experts < 2:
        return {}
    found = {name: [] for name in GEOMETRY}  # type: dict[str, list[float]]
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(PERMUTATIONS):
        random_ED = normalize(torch.randn(experts, width, generator=generator), dim=-1)
        for name, of in GEOMETRY.items():
            found[name].append(of(random_ED))
    chances = {"mean_abs_cosine": math.sqrt(2 / (math.pi * width)), "mean_cosine": 0.0}
    return {
        name: measured(
            of(anchors_ED),
            np.array(found[name]),
            np.empty(0),
            smaller=name == "effective_rank",
            chance=chances.get(name, np.nan),
        )
        for name, of in GEOMETRY.items()
    }


def effective_rank(anchors_ED: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
    wide_ED = anchors_ED.double()
    squares_E = torch.linalg.eigvalsh(wide_ED @ wide_ED.T)
    singular = squares_E.clamp(min=0).sqrt()
    shares = singular[singular > 0] / singular.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def _off_diagonal(anchors_ED: Tensor) -> Tensor:
    gram_EE = anchors_ED @ anchors_ED.T
    return gram_EE[~torch.eye(len(gram_EE), dtype=torch.bool)]


def _mean_cosine(anchors_ED: Tensor) -> float:
    return float(_off_diagonal(anchors_ED).mean())


def _mean_abs_cosine(anchors_ED: Tensor) -> float:
    return float(_off_diagonal(anchors_ED).abs().mean())


def _largest_cosine(anchors_ED: Tensor) -> float:
    return float(_off_diagonal(anchors_ED).max())


GEOMETRY = {
    "mean_cosine": _mean_cosine,
    "mean_abs_cosine": _mean_abs_cosine,
    "largest_cosine": _largest_cosine,
    "effective_rank": effective_rank,
}


def principal_plane(space: AnchorSpace, shown: NDArray[np.int64]) -> tuple[Floats, Floats, str]:
    """Anchors (E x 2) and some tokens (S x 2) in the two principal directions of both, each centred on
    its own mean, and what to say of the plane."""
    parts = _centred(space, shown)
    both = torch.cat([part / part.norm().clamp(min=1e-12) for part in parts])
    _, singular, directions = torch.linalg.svd(both, full_matrices=False)
    share = float(singular[:2].square().sum() / singular.square().sum())
    first, second = ((part @ directions[:2].T).double().numpy() for part in parts)
    return first, second, f"{share:.0%} of the variance"


def neighbour_plane(space: AnchorSpace, shown: NDArray[np.int64]) -> tuple[Floats, Floats, str]:
    """The same by UMAP (arXiv 1802.03426), by cosine, with a fixed seed: neighbours stay neighbours,
    distances mean nothing."""
    import umap  # optional, see require_umap

    both = torch.cat(_centred(space, shown)).numpy()
    reducer = umap.UMAP(metric="cosine", random_state=SEED, n_jobs=1)
    plane: Floats = reducer.fit_transform(both).astype(np.float64)
    experts = len(space.anchors_ED)
    return plane[:experts], plane[experts:], "UMAP, cosine"


PLANES = {"pca": principal_plane, "umap": neighbour_plane}


def require_umap(plane: str) -> None:
    """Raise `BackendUnavailable` if UMAP is wanted and not installed."""
    if plane == "umap" and importlib.util.find_spec("umap") is None:
        raise BackendUnavailable("--map umap needs umap-learn: pip install 'sra_ds[analysis]'")


def _centred(space: AnchorSpace, shown: NDArray[np.int64]) -> list[Tensor]:
    tokens_SD = space.vocabulary_VD[torch.from_numpy(shown)]
    return [part - part.mean(0) for part in (space.anchors_ED, tokens_SD)]
