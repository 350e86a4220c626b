"""Whether the order of a document's sentences can be told from others, which two of the measures ask.

A document is compared with 20 orders of its sentences, drawn as a function of the set of them: a text and
its shuffled twin meet the same orders. (Order discrimination: Barzilay and Lapata 2008.)
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ORDERS = 20


def seeded(texts: Sequence[str], purpose: str) -> np.random.Generator:
    """Random numbers that the words of some texts and a purpose decide, not the blanks between them."""
    key = "\n".join([purpose, *map(one_line, texts)])
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def one_line(text: str) -> str:
    """The text with single blanks."""
    return " ".join(text.split())


def other_orders(sentences: Sequence[str], count: int = ORDERS) -> list[NDArray[np.int64]]:
    """Orders (indices) of the sentences, `count` less those that read as the document itself does; none
    for a document whose sentences are all alike."""
    texts = [one_line(sentence) for sentence in sentences]
    canonical = np.array(sorted(range(len(texts)), key=texts.__getitem__), np.int64)
    rng = seeded([texts[i] for i in canonical], "orders")
    drawn = [rng.permutation(canonical) for _ in range(count)]
    return [order for order in drawn if [texts[i] for i in order] != texts]


def share_beaten(own: float, others: Sequence[float]) -> float:
    """Share of the others that score lower, ties count one half; but 0 where all tie, or there are none:
    then nothing in the document depends on its order, and a half would reward that."""
    difference = own - np.asarray(others, np.float64)
    if not difference.any():
        return 0.0
    return float((difference > 0).mean() + (difference == 0).mean() / 2)
