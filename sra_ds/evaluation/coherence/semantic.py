"""Semantic coherence: neighbours mean more alike things than sentences of different texts do.

    m = mean cosine of adjacent sentences          r = mean cosine of sentences of different sources
    semantic = clip((m - r) / (1 - r), 0, 1)

m is that of Foltz, Kintsch and Landauer 1998. r is that of the same kind of text: an encoder finds any
two lines of gibberish alike, and beside human r a model that always writes the same would seem coherent.
A neighbour that has been there before word for word says nothing new and counts 0.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


def semantic(vectors_SD: Vectors, repeated_S: Sequence[bool], unrelated: float) -> float:
    """Of a document with the unit vector of each sentence, whether it is a repetition, and r; NaN for a
    single sentence or without r."""
    if len(vectors_SD) < 2 or not unrelated < 1:
        return float("nan")
    cosines = (vectors_SD[:-1] * vectors_SD[1:]).sum(-1, dtype=np.float64)
    adjacent = float((cosines * ~np.array(repeated_S[1:], bool)).mean())
    return min(max((adjacent - unrelated) / (1 - unrelated), 0.0), 1.0)


def unrelated_cosine(documents: Sequence[Vectors], sources: Sequence[int]) -> float:
    """r: mean over all pairs of sentences from documents of different sources, given the vectors of each
    document and the number of its source. NaN where there is but one source."""
    sums: dict[int, NDArray[np.float64]] = {}
    sizes: dict[int, int] = {}
    for own_SD, number in zip(documents, sources, strict=True):
        sums[number] = sums.get(number, 0.0) + own_SD.sum(0, dtype=np.float64)
        sizes[number] = sizes.get(number, 0) + len(own_SD)
    if len(sums) < 2:
        return float("nan")
    total, size = sum(sums.values()), sum(sizes.values())
    within = sum(float(own @ own) for own in sums.values())
    pairs = size**2 - sum(own**2 for own in sizes.values())
    return (float(np.dot(total, total)) - within) / pairs
