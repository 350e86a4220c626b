"""Whether the pieces of a word stay together: subtoken coherence.

Over neighbouring tokens of one word, the share whose first choice is the same expert, and the mean
Jaccard overlap of all their choices. Letters: N tokens, K experts per token, S neighbouring pairs.
"""

import numpy as np
from numpy.typing import NDArray

from sra_ds.analysis.statistics import (
    PERMUTATIONS,
    Floats,
    Measured,
    measured,
    resampling_weights,
)
from sra_ds.analysis.tables import SEED, Routes


def neighbours_within_words(word_unit_of_token_N: NDArray[np.integer]) -> NDArray[np.int64]:
    """Tokens whose next one belongs to the same word; negative numbers belong to none."""
    same = word_unit_of_token_N[:-1] == word_unit_of_token_N[1:]
    return np.flatnonzero(same & (word_unit_of_token_N[:-1] >= 0))


def subtoken_coherence(first_S: NDArray[np.int64], routes: Routes) -> dict[str, Measured]:
    """Agreement of the pairs (token, next token) at `first_S`. The null permutes the decisions among
    the tokens of these pairs; chance is that of two independent ones."""
    involved = np.union1d(first_S, first_S + 1)
    a_S, b_S = np.searchsorted(involved, first_S), np.searchsorted(involved, first_S + 1)
    experts_NK, untrained_NK = routes.experts_NK[involved], routes.untrained_NK[involved]
    rng = np.random.default_rng(SEED)
    nulls: dict[str, list[float]] = {name: [] for name in AGREEMENTS}
    for _ in range(PERMUTATIONS):
        other_NK = rng.permutation(experts_NK)
        for name, agreement in AGREEMENTS.items():
            nulls[name].append(_mean(agreement(other_NK[a_S], other_NK[b_S])))
    share_E = np.bincount(experts_NK[:, 0], minlength=routes.experts) / max(len(involved), 1)
    chances = {"subtoken_agreement": _mean(share_E[experts_NK[:, 0]])}  # sum of the squares
    found = {}
    for name, agreement in AGREEMENTS.items():
        values_S = agreement(experts_NK[a_S], experts_NK[b_S])
        found[name] = measured(
            _mean(values_S),
            np.array(nulls[name]),
            _resampled_means(values_S, routes.block_N[first_S]),
            chance=chances.get(name, np.nan),
            untrained=_mean(agreement(untrained_NK[a_S], untrained_NK[b_S])),
        )
    return found


def same_first_choice(a_SK: NDArray[np.integer], b_SK: NDArray[np.integer]) -> Floats:
    """1 where the first choices agree."""
    same_S: Floats = (a_SK[:, 0] == b_SK[:, 0]).astype(np.float64)
    return same_S


def jaccard(a_SK: NDArray[np.integer], b_SK: NDArray[np.integer]) -> Floats:
    """Common choices over all choices of two tokens."""
    common_S = (a_SK[:, :, None] == b_SK[:, None, :]).sum((1, 2))
    overlap_S: Floats = common_S / (2 * a_SK.shape[1] - common_S)
    return overlap_S


AGREEMENTS = {"subtoken_agreement": same_first_choice, "subtoken_overlap": jaccard}


def _mean(values_S: Floats) -> float:
    return float(values_S.mean()) if len(values_S) else float("nan")


def _resampled_means(values_S: Floats, block_S: NDArray[np.int64]) -> Floats:
    blocks, owner_S = np.unique(block_S, return_inverse=True)
    sums_B, counts_B = np.bincount(owner_S, values_S), np.bincount(owner_S)
    weights_RB = resampling_weights(len(blocks))
    means_R: Floats = (weights_RB @ sums_B) / (weights_RB @ counts_B).clip(min=1)
    return means_R
