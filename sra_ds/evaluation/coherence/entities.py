"""Entity coherence: sentences near each other speak of the same things.

The entity graph (Guinaudeau and Strube 2013) joins sentence i to every later sentence k by the number of
entities they share over their distance, and a document scores the mean weight that leaves a sentence:

    w_ik = |E_i and E_k| / (k - i)      graph = (1 / S) sum_i sum_{k > i} w_ik
    entity = share of other orders of the sentences with a lower graph score

Without grammatical roles these are the paper's shared-entity weights (P_W), not those by role (P_Acc).
"""

from collections.abc import Sequence, Set
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sra_ds.evaluation.coherence.orders import other_orders, share_beaten

DIGITS = 9
"""Scores that differ by less than rounding are ties."""


def entity(sentences: Sequence[str], entities_S: Sequence[Set[str]]) -> float:
    """Of a document with the entities of each of its sentences, 0 where no two of them share any; NaN for
    a single sentence."""
    if len(sentences) < 2:
        return float("nan")
    shared_SS = shared_entities(entities_S)
    orders = other_orders(sentences)
    own = graph_score(shared_SS)
    return share_beaten(own, [graph_score(shared_SS[np.ix_(order, order)]) for order in orders])


def shared_entities(entities_S: Sequence[Set[str]]) -> NDArray[np.int64]:
    """How many entities each pair of sentences has in common."""
    return np.array([[len(a & b) for b in entities_S] for a in entities_S], np.int64)


def any_shared(entities_S: Sequence[Set[str]]) -> bool:
    """Whether the graph has an edge."""
    return bool(np.triu(shared_entities(entities_S), 1).any())


def graph_score(shared_SS: NDArray[np.int64]) -> float:
    """Mean weight that leaves a sentence towards later ones."""
    size = len(shared_SS)
    total = sum(np.trace(shared_SS, distance) / distance for distance in range(1, size))
    return round(float(total) / size, DIGITS) if size else 0.0


def entity_overlap(entities_S: Sequence[Set[str]]) -> float:
    """Mean over adjacent sentences of the share of the smaller one's entities that both have, 0 where one
    has none; NaN for a single sentence."""
    pairs = list(pairwise(entities_S))
    if not pairs:
        return float("nan")
    shares = [len(a & b) / min(len(a), len(b)) if a and b else 0.0 for a, b in pairs]
    return sum(shares) / len(shares)
