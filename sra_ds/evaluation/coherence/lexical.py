"""Lexical cohesion: neighbours share words, and the text does not repeat itself.

    A = share of adjacent sentences with a content lemma in common
    R = distinct 4-grams of words / all 4-grams              lexical = A R

A is argument overlap (Graesser et al. 2004, after Halliday and Hasan 1976), R is one minus the share of
repeated 4-grams (Welleck et al. 2020). MATTR is the type-token ratio, mean over all windows of 50 words
(Covington and McFall 2010).
"""

import math
from collections.abc import Sequence, Set
from itertools import pairwise

GRAM = 4
WINDOW = 50


def lexical(content_S: Sequence[Set[str]], words: Sequence[str]) -> float:
    """Of a document with the content lemmas of each sentence and all its words; NaN for a single sentence
    or fewer than four words."""
    pairs = list(pairwise(content_S))
    grams = list(zip(*(words[start:] for start in range(GRAM)), strict=False))
    if not pairs or not grams:
        return float("nan")
    overlap = sum(bool(a & b) for a, b in pairs) / len(pairs)
    return overlap * len(set(grams)) / len(grams)


def log_mattr(words: Sequence[str], window: int = WINDOW) -> float:
    """Logarithm of the mean type-token ratio; NaN for fewer words than a window."""
    windows = [words[start : start + window] for start in range(len(words) - window + 1)]
    if not windows:
        return float("nan")
    return math.log(sum(len(set(own)) for own in windows) / (window * len(windows)))
