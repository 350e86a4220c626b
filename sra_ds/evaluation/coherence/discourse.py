"""Discourse coherence: a language model finds this order of the sentences likelier than others.

    discourse = share of other orders with a lower log-likelihood under the judge

(Order discrimination: Barzilay and Lapata 2008; with a neural model, Li and Jurafsky 2017.) Sentences
become tokens one by one and are joined after the opening token, so all orders have the same tokens, and
the sum stands for the mean. Only the first sentences that fit into the judge's window count.
"""

from collections.abc import Sequence

from sra_ds.evaluation.coherence.orders import one_line, other_orders, share_beaten
from sra_ds.evaluation.coherence.scoring import Row, TextModel, row_nll

Order = tuple[str, ...]


def discourse(judge: TextModel, documents: Sequence[Sequence[str]]) -> list[float]:
    """Of each document, 0 where all sentences are alike; NaN for one of which fewer than two sentences
    fit. A row of sentences that several documents ask for is scored once."""
    pieces: dict[str, list[int]] = {}
    for sentence in {one_line(sentence) for document in documents for sentence in document}:
        pieces[sentence] = judge.encode(f" {sentence}")
    asked = [_orders(_fitting(document, pieces, judge.window)) for document in documents]
    rows = list(dict.fromkeys(row for orders in asked if len(orders) > 1 for row in orders))
    nll = row_nll(judge, [Row([pieces[s] for s in row]) for row in rows], "judging orders")
    score = dict(zip(rows, (-nll).tolist(), strict=True))
    return [
        share_beaten(score.get(own, 0.0), [score[order] for order in others])
        if len(own) > 1
        else float("nan")
        for own, *others in asked
    ]


def _fitting(document: Sequence[str], pieces: dict[str, list[int]], window: int) -> Order:
    """The first sentences that fit beside the opening token."""
    room, kept = window - 1, []
    for sentence in map(one_line, document):
        room -= len(pieces[sentence])
        if room < 0:
            break
        kept.append(sentence)
    return tuple(kept)


def _orders(sentences: Order) -> list[Order]:
    """The document's own order, then the others."""
    others = other_orders(sentences)
    return [sentences, *(tuple(sentences[i] for i in order) for order in others)]
