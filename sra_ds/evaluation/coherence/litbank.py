"""How well do equal lemmas stand for equal entities? LitBank (Bamman et al. 2020), where it is at hand.

The entity graph takes two nouns or names for the same entity if their lemmas agree. LitBank has chains of
mentions of persons, places and the like in a hundred novels. Over pairs of mentions headed by a noun or
name, in different sentences of a document that are no further apart than a scored text is long:

    precision = pairs of one lemma and one chain / pairs of one lemma
    recall    = pairs of one lemma and one chain / pairs of one chain

Mentions by pronoun are not seen by the entity graph; their share is told apart. The head of a mention is
the end of its first run of nouns and names.
"""

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sra_ds.data.files import naming, open_text
from sra_ds.errors import DataError
from sra_ds.evaluation.coherence.documents import MOST
from sra_ds.evaluation.coherence.tagging import Tagger, Word
from sra_ds.intervals import share

BEGIN = "#begin document"
FORM = 3
CHAIN = re.compile(r"(\(?)(\d+)(\)?)")


class Mention(NamedTuple):
    """Tokens `start` to `end` of a sentence, which speak of the entity of a chain."""

    start: int
    end: int
    chain: int


class Sentence(NamedTuple):
    """Its tokens and mentions."""

    forms: list[str]
    mentions: list[Mention]


class Head(NamedTuple):
    """Of a mention: where, of which chain, and what the entity graph sees of it."""

    sentence: int
    chain: int
    lemma: str


class Counts(NamedTuple):
    """Of one document: pairs of headed mentions, and mentions."""

    one_lemma: int
    one_chain: int
    both: int
    headed: int
    mentions: int


def litbank_agreement(documents: Sequence[list[Sentence]], tagger: Tagger) -> dict[str, Any]:
    """Precision and recall of equal lemmas, and the share of mentions that have any, with intervals over
    documents."""
    counts = [count(own, tagger) for own in tqdm(documents, "reading LitBank", leave=False)]
    one_lemma, one_chain, both, headed, mentions = np.array(counts, np.float64).T.tolist()
    numbers = range(len(counts))
    return {
        "precision": share(both, one_lemma, numbers).as_dict(),
        "recall": share(both, one_chain, numbers).as_dict(),
        "mentions_with_a_noun_or_name": share(headed, mentions, numbers).as_dict(),
        "documents": len(documents),
    }


def count(document: Sequence[Sentence], tagger: Tagger) -> Counts:
    """Pairs are of different sentences, at most `MOST` apart."""
    heads = [
        Head(number, mention.chain, head_of(words[mention.start : mention.end + 1]))
        for number, sentence in enumerate(document)
        for words in [tagger.words(sentence.forms)]
        for mention in sentence.mentions
    ]
    seen = [head for head in heads if head.lemma]
    at_M = np.array([head.sentence for head in seen])
    apart_MM = at_M - at_M[:, None]
    pairs_MM = (apart_MM > 0) & (apart_MM <= MOST)
    lemma_M = np.array([head.lemma for head in seen])
    chain_M = np.array([head.chain for head in seen])
    lemma_MM = pairs_MM & (lemma_M == lemma_M[:, None])
    chain_MM = pairs_MM & (chain_M == chain_M[:, None])
    both = int((lemma_MM & chain_MM).sum())
    return Counts(int(lemma_MM.sum()), int(chain_MM.sum()), both, len(seen), len(heads))


def head_of(words: Sequence[Word]) -> str:
    """Lemma of the last word of the first run of nouns and names; empty without any."""
    lemma = ""
    for word in words:
        if word.is_entity:
            lemma = word.lemma
        elif lemma:
            break
    return lemma


def read_litbank(path: Path) -> list[list[Sentence]]:
    """The documents of a CoNLL-2012 file with chains in the last column. Raises `DataError`."""
    documents: list[list[Sentence]] = []
    rows: list[list[str]] = []
    with naming(path), open_text(path) as stream:
        for line in chain(stream, [""]):
            if line.startswith(BEGIN):
                documents.append([])
            elif line.strip() and not line.startswith("#"):
                rows.append(line.rstrip("\n").split("\t"))
            elif rows and documents:
                documents[-1].append(_sentence(rows))
                rows = []
    if not any(sentence.mentions for document in documents for sentence in document):
        raise DataError(f"{path} has no coreference chains; expected CoNLL-2012 as LitBank has it")
    return documents


def _sentence(rows: list[list[str]]) -> Sentence:
    mentions: list[Mention] = []
    open_at: dict[int, list[int]] = {}
    for at, columns in enumerate(rows):
        for opens, number, closes in CHAIN.findall(columns[-1]):
            starts = open_at.setdefault(int(number), [])
            if opens:
                starts.append(at)
            if closes and starts:
                mentions.append(Mention(starts.pop(), at, int(number)))
    return Sentence([columns[FORM] for columns in rows], mentions)
