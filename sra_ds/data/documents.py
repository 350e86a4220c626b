"""What a corpus is made of: documents in splits, and the rules that keep the splits apart."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

SPLITS = ("train", "valid", "test")
NGRAM = 13


class Document(NamedTuple):
    """One text with the label of its domain and its length in reference words."""

    text: str
    domain: str
    words: int


class Source(Protocol):
    """A corpus that can be read again and again, split by split, without holding it in memory."""

    def identity(self) -> dict[str, object]:
        """What decides the text: file names and sizes, package versions, the data set's name."""

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of one of `SPLITS`, always in the same order."""


def split_by_hash(key: str, held_out: float) -> str:
    """A fixed split for a key: `held_out` of all keys go to valid, as many to test."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    return "valid" if share < held_out else "test" if share < 2 * held_out else "train"


def ngrams(text: str) -> Iterator[tuple[str, ...]]:
    """The word 13-grams of a text, lower-cased, punctuation ignored."""
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[start:] for start in range(NGRAM)), strict=False)


def drop_shared(pieces: list[str], forbidden: set[tuple[str, ...]]) -> list[str]:
    """The pieces of one document whose joined text holds no forbidden 13-gram.

    Every piece that touches a forbidden n-gram goes; joining the rest can make new n-grams across the
    gaps, so the check repeats until the document is clean.
    """
    while True:
        words: list[str] = []
        owners: list[int] = []
        for number, piece in enumerate(pieces):
            found = re.findall(r"\w+", piece.lower())
            words += found
            owners += [number] * len(found)
        shared: set[int] = set()
        for start in range(len(words) - NGRAM + 1):
            if tuple(words[start : start + NGRAM]) in forbidden:
                shared.update(owners[start : start + NGRAM])
        if not shared:
            return pieces
        pieces = [piece for number, piece in enumerate(pieces) if number not in shared]


def ngram_set(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """All 13-grams of some texts."""
    return {gram for text in texts for gram in ngrams(text)}
