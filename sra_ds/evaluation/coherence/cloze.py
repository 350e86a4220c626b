"""Does a language model know which connective joins two sentences?

Where a sentence of human text begins with one of ten explicit connectives of the Penn Discourse Treebank
(Prasad et al. 2008), or has it after a comma, each of the ten is put in its place; the model is right if
the sentence with the true one is the likeliest after what comes before. Whether the word does connect
there is not checked. Accuracy by chance is 0.1; always naming the most frequent one gives more.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sra_ds.evaluation.coherence.documents import Passage
from sra_ds.evaluation.coherence.scoring import Row, TextModel, row_nll
from sra_ds.intervals import share

CONNECTIVES = (
    "however", "because", "although", "therefore", "but", "so", "while", "then", "also", "for example",
)  # fmt: skip
PLACE = re.compile(rf"(?:^|(?<=, )|(?<=; ))(?:{'|'.join(CONNECTIVES)})\b", re.IGNORECASE)
MOST = 200


class Gap(NamedTuple):
    """A sentence with a hole, and the text before it."""

    source: int
    context: str
    before: str
    after: str
    true: int
    """Number of the connective that was there."""


def connective_cloze(model: TextModel, passages: Sequence[Passage]) -> dict[str, Any]:
    """Accuracy over the first gaps of the passages."""
    gaps = [gap for passage in passages for gap in gaps_of(passage)][:MOST]
    rows = [_row(model, gap, choice) for gap in gaps for choice in CONNECTIVES]
    nll_GC = row_nll(model, rows, "trying connectives").reshape(-1, len(CONNECTIVES))
    true_G = np.array([gap.true for gap in gaps], np.int64)
    right_G = (nll_GC.argmin(1) == true_G).astype(float).tolist()
    sources = [gap.source for gap in gaps]
    most_frequent = max(Counter(true_G.tolist()).values(), default=0) / max(len(gaps), 1)
    return {
        "accuracy": share(right_G, [1.0] * len(gaps), sources).as_dict(),
        "chance": 1 / len(CONNECTIVES),
        "always_the_most_frequent": most_frequent,
        "sentences": len(gaps),
    }


def gaps_of(passage: Passage) -> list[Gap]:
    """The first connective of every sentence but the first that has one."""
    found = []
    for number, sentence in enumerate(passage.sentences[1:], 1):
        match = PLACE.search(sentence)
        if match is not None:
            context = " ".join(passage.sentences[:number])
            before, after = sentence[: match.start()], sentence[match.end() :]
            true = CONNECTIVES.index(match.group().lower())
            found.append(Gap(passage.source, context, before, after, true))
    return found


def _row(model: TextModel, gap: Gap, choice: str) -> Row:
    """As much of the context as fits is given, the sentence is scored, cut where the window ends."""
    written = choice if gap.before else choice.capitalize()
    sentence = model.encode(f" {gap.before}{written}{gap.after}")[: model.window - 1]
    room = model.window - 1 - len(sentence)
    context = model.encode(f" {gap.context}")
    kept = context[len(context) - min(room, len(context)) :]
    return Row((kept, sentence), given=len(kept))
