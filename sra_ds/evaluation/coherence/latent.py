"""Latent semantic analysis (Deerwester et al. 1990), for where there is no trained encoder.

    tf-idf of a sentence, 1 x V  ->  its first 100 right singular directions  ->  unit length

The directions are found by a randomised range finder (Halko, Martinsson and Tropp 2011) from fixed random
numbers, so that they are the same every time. Letters: S sentences, V words, C directions.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy.sparse import csr_array

from sra_ds.evaluation.coherence.semantic import Vectors
from sra_ds.evaluation.coherence.sentences import words

DIRECTIONS = 100
SPARE_DIRECTIONS, ROUNDS = 20, 4
SMALLEST = 1e-6
"""Singular values below this share of the largest are rounding."""


class LatentSemantics:
    """Fitted to some sentences; knows the words they have."""

    def __init__(self, sentences: Sequence[str]) -> None:
        counts = Counter(word for sentence in sentences for word in set(words(sentence)))
        self.column = {word: number for number, word in enumerate(sorted(counts))}
        self.weight_V = np.array(
            [1 + math.log((1 + len(sentences)) / (1 + counts[word])) for word in self.column]
        )
        self.directions_VC = right_directions(self._table(sentences), DIRECTIONS)
        found = self.directions_VC.shape[1]
        self.name = f"TF-IDF + SVD-{found}, scipy {scipy.__version__}"

    def __call__(self, sentences: Sequence[str]) -> Vectors:
        """Zero where no word is known."""
        vectors_SC = self._table(sentences) @ self.directions_VC
        length_S1 = np.linalg.norm(vectors_SC, axis=1, keepdims=True)
        unit_SC: Vectors = (vectors_SC / np.where(length_S1 > 0, length_S1, 1)).astype(np.float32)
        return unit_SC

    def _table(self, sentences: Sequence[str]) -> csr_array:
        """tf-idf, S x V."""
        entries = [
            (row, self.column[word], count)
            for row, sentence in enumerate(sentences)
            for word, count in Counter(words(sentence)).items()
            if word in self.column
        ]
        rows, columns, counts = np.array(entries, np.int64).reshape(-1, 3).T
        values = counts * self.weight_V[columns]
        return csr_array((values, (rows, columns)), shape=(len(sentences), len(self.column)))


def right_directions(table_SV: csr_array, most: int) -> NDArray[Any]:
    """The right singular vectors of the largest singular values, V x C; C is at most `most` and the
    rank."""
    size = min(most + SPARE_DIRECTIONS, *table_SV.shape)
    start_SC = np.random.default_rng(0).normal(size=(table_SV.shape[0], size))
    range_VC = np.linalg.qr(table_SV.T @ start_SC)[0]
    for _ in range(ROUNDS):
        range_VC = np.linalg.qr(table_SV.T @ (table_SV @ range_VC))[0]
    _, values_C, turned_CC = np.linalg.svd(table_SV @ range_VC, full_matrices=False)
    kept = min(most, int((values_C > SMALLEST * values_C[:1]).sum()))
    found: NDArray[Any] = range_VC @ turned_CC[:kept].T
    return found
