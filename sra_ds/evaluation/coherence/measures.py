"""The four measures and their companions for kinds of documents side by side: human, written, spoilt.

What is costly is done once: a sentence is tagged and encoded once wherever it stands, and an order of
sentences is judged once for all documents that are compared with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sra_ds.evaluation.coherence.discourse import discourse
from sra_ds.evaluation.coherence.documents import Document
from sra_ds.evaluation.coherence.encoder import Encode
from sra_ds.evaluation.coherence.entities import any_shared, entity, entity_overlap
from sra_ds.evaluation.coherence.lexical import lexical, log_mattr
from sra_ds.evaluation.coherence.scoring import TextModel
from sra_ds.evaluation.coherence.semantic import Vectors, semantic, unrelated_cosine
from sra_ds.evaluation.coherence.sentences import plain, repeats, words
from sra_ds.evaluation.coherence.tagging import Tagger
from sra_ds.intervals import Estimate, mean

MEASURES = ("entity", "semantic", "discourse", "lexical")
COMPANIONS = (
    "entity_where_shared", "without_shared_entities", "entity_overlap", "log_mattr_50", "sentences",
    "words",
)  # fmt: skip
"""Told beside them as means, without intervals; the first is entity of the documents that share any."""
Kinds = Mapping[str, Sequence[Document]]
Values = dict[str, list[float]]


class Instruments(NamedTuple):
    """What documents are measured with."""

    judge: TextModel
    encode: Encode
    tagger: Tagger


def measure(kinds: Kinds, instruments: Instruments) -> dict[str, dict[str, Any]]:
    """By kind: each measure's mean with its interval over sources and the number of documents it is
    defined for, `companions` and r, the cosine of unrelated sentences."""
    vectors = _vectors(kinds, instruments.encode)
    judged = _judged(kinds, instruments.judge)
    found = {}
    for kind, documents in kinds.items():
        sources = [document.source for document in documents]
        encoded = [_rows(vectors, document) for document in documents]
        unrelated = unrelated_cosine(encoded, sources)
        values, companions = _of_words(documents, instruments.tagger)
        values["discourse"] = judged[kind]
        values["semantic"] = [
            semantic(own_SD, repeats(map(plain, document.sentences)), unrelated)
            for own_SD, document in zip(encoded, documents, strict=True)
        ]
        found[kind] = {
            **{name: summary(values[name], sources) for name in MEASURES},
            "companions": {
                n: mean(own, sources).as_dict()["value"] for n, own in companions.items()
            },
            "unrelated_cosine": Estimate(unrelated).as_dict()["value"],
        }
    return found


def summary(values: Sequence[float], sources: Sequence[int]) -> dict[str, float | int | None]:
    """Mean, interval and how many values there are."""
    defined = int(np.isfinite(values).sum())
    return {**mean(values, sources).as_dict(), "documents": defined}


def _of_words(documents: Sequence[Document], tagger: Tagger) -> tuple[Values, Values]:
    """The measures that count words, and their companions."""
    values: Values = {"entity": [], "lexical": []}
    companions: Values = {name: [] for name in COMPANIONS}
    for document in documents:
        tagged = [tagger(sentence) for sentence in document.sentences]
        entities = [own.entities for own in tagged]
        spoken = [word for sentence in document.sentences for word in words(plain(sentence))]
        values["entity"].append(entity(document.sentences, entities))
        shared = any_shared(entities)
        companions["entity_where_shared"].append(values["entity"][-1] if shared else np.nan)
        values["lexical"].append(lexical([own.content for own in tagged], spoken))
        companions["entity_overlap"].append(entity_overlap(entities))
        companions["without_shared_entities"].append(not shared)
        companions["log_mattr_50"].append(log_mattr(spoken))
        companions["sentences"].append(len(document.sentences))
        companions["words"].append(len(spoken))
    return values, companions


def _judged(kinds: Kinds, judge: TextModel) -> Values:
    """Discourse of every document, all kinds at once."""
    documents = [document.sentences for own in kinds.values() for document in own]
    scores = iter(discourse(judge, documents))
    return {kind: [next(scores) for _ in own] for kind, own in kinds.items()}


def _vectors(kinds: Kinds, encode: Encode) -> dict[str, Vectors]:
    """Of every distinct sentence."""
    texts = dict.fromkeys(
        plain(sentence)
        for documents in kinds.values()
        for document in documents
        for sentence in document.sentences
    )
    return dict(zip(texts, encode(list(texts)), strict=True))


def _rows(vectors: dict[str, Vectors], document: Document) -> Vectors:
    return np.stack([vectors[plain(sentence)] for sentence in document.sentences])
