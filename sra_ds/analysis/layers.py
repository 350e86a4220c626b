"""What a routed layer as a whole does with token types, words, grammar and domains.

Every measure is a `Measured`: value, chance, null of permuted decisions, the untrained twin, interval.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sra_ds.analysis.counts import pair_counts
from sra_ds.analysis.statistics import (
    PERMUTATIONS,
    Measured,
    block_of_documents,
    measured,
    resampling_weights,
    with_adjusted_p,
)
from sra_ds.analysis.subtokens import neighbours_within_words, subtoken_coherence
from sra_ds.analysis.syntax import CLASSES
from sra_ds.analysis.tables import (
    SEED,
    Routes,
    mean_divergence,
    mean_label_share,
    measure,
    normalised_mutual_information,
)
from sra_ds.analysis.traces import Trace
from sra_ds.analysis.words import Words, of_units

Ints = NDArray[np.int64]

NULL_TOKENS = 2**18
"""With as many, the null's own sampling noise is far below the spread between experts."""

TOKEN_MEASURES = {
    "token_information": normalised_mutual_information,
    "token_divergence": mean_divergence,
    "vocabulary_specialisation": mean_label_share,
}


class Labels(NamedTuple):
    """What is known of each of N tokens besides its type."""

    words: Words
    classes_M: NDArray[np.int8]
    """Part of speech of each unit, -1 where it was not tagged."""
    block_of_document: Ints
    block_N: Ints
    domain_N: Ints

    @property
    def class_N(self) -> NDArray[np.int8]:
        """Part of speech of the word each token belongs to, -1 for none."""
        return of_units(self.classes_M, self.words.unit_of_token_N)

    @property
    def word_unit_N(self) -> NDArray[np.int32]:
        """Unit of each token that is part of a word, -1 for the others."""
        return np.where(self.words.word_of_token_N >= 0, self.words.unit_of_token_N, -1)


def label_tokens(trace: Trace, words: Words, classes_M: NDArray[np.int8]) -> Labels:
    """Labels of every traced token."""
    block_of_document = block_of_documents(trace.documents["start"], trace.tokens)
    domain_N = _of_tokens(trace, trace.documents["domain"])
    block_N = _of_tokens(trace, block_of_document)
    return Labels(words, classes_M, block_of_document, block_N, domain_N)


def _of_tokens(trace: Trace, values_D: NDArray[np.integer]) -> Ints:
    """Each token's value of a property of documents."""
    lengths = np.diff(np.append(trace.documents["start"], trace.tokens))
    return np.repeat(values_D.astype(np.int64), lengths)


def routes_of(trace: Trace, layer: int, labels: Labels) -> Routes:
    """Decisions of one layer."""
    return Routes(
        np.asarray(trace.experts_NLK[:, layer]),
        np.asarray(trace.untrained_NLK[:, layer]),
        labels.block_N,
        trace.slots_L[layer],
    )


def measure_layer(trace: Trace, layer: int, labels: Labels) -> dict[str, Measured]:
    """Every measure of one layer that needs no words; p is not adjusted yet."""
    routes = routes_of(trace, layer, labels)
    found = measure(TOKEN_MEASURES, trace.tokens_N, trace.vocab_size, routes)
    share_E = trace.load_LE[layer] / trace.load_LE[layer].sum()
    chance = float((share_E**2).sum())
    found["vocabulary_specialisation"] = found["vocabulary_specialisation"]._replace(chance=chance)
    class_N = labels.class_N
    tagged = np.flatnonzero(class_N >= 0)
    if tagged.size:
        named = {"syntax_information": normalised_mutual_information}
        found |= measure(named, class_N[tagged], len(CLASSES), routes.where(tagged))
    if np.ptp(labels.domain_N) > 0:
        named = {"domain_information": normalised_mutual_information}
        dealt = partial(dealt_domains, trace)
        found |= measure(named, labels.domain_N, len(trace.domains), routes, dealt)
    found |= subtoken_coherence(neighbours_within_words(labels.word_unit_N), routes)
    if trace.top_k > 1:
        found["co_activation"] = co_activation(routes)
    zero_chance = ("token_information", "syntax_information", "domain_information")
    return {n: m._replace(chance=0.0) if n in zero_chance else m for n, m in found.items()}


def dealt_domains(trace: Trace, rng: np.random.Generator) -> Ints:
    """The domain of every token, had the documents' domains been dealt to them at random: that documents
    differ from each other is no difference between domains."""
    return _of_tokens(trace, rng.permutation(trace.documents["domain"]))


def adjust_over_layers(layers: list[dict[str, Measured]]) -> list[dict[str, Measured]]:
    """p of every measure of every layer, adjusted as one family."""
    flat = with_adjusted_p([measure for layer in layers for measure in layer.values()])
    again = iter(flat)
    return [{name: next(again) for name in layer} for layer in layers]


def co_activation(routes: Routes) -> Measured:
    """Mean over experts of the share of its tokens that its most frequent partner serves, too (OLMoE,
    arXiv 2409.02060). In the null tokens, at most `NULL_TOKENS` of them, have swapped choices, which
    keeps the loads."""
    rng = np.random.default_rng(SEED)
    step = -(-len(routes.experts_NK) // NULL_TOKENS)
    null, swapped_NK = [], routes.experts_NK[::step]
    for _ in range(PERMUTATIONS):
        swapped_NK = swap_choices(swapped_NK, rng)
        null.append(_strongest_partner(pair_counts(swapped_NK, routes.experts)))
    blocks = np.unique(routes.block_N)
    parts_BEE = np.stack(
        [pair_counts(routes.experts_NK[routes.block_N == b], routes.experts) for b in blocks]
    )
    resampled = [
        _strongest_partner(np.tensordot(weights_B, parts_BEE, 1))
        for weights_B in resampling_weights(len(blocks))
    ]
    value = _strongest_partner(parts_BEE.sum(0))
    untrained = _strongest_partner(pair_counts(routes.untrained_NK, routes.experts))
    return measured(value, np.array(null), np.array(resampled), untrained=untrained)


def swap_choices(experts_NK: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.integer]:
    """The tokens in another order, after random pairs of them swapped a choice, K times over; not where
    one of them would have the same expert twice."""
    half, top_k = len(experts_NK) // 2, experts_NK.shape[1]
    for _ in range(top_k):
        experts_NK = experts_NK[rng.permutation(len(experts_NK))]
        ours_HK, theirs_HK = experts_NK[:half], experts_NK[half : 2 * half]
        i, j = rng.integers(top_k, size=2)
        our_H, their_H = ours_HK[:, i].copy(), theirs_HK[:, j].copy()
        clash_H = (ours_HK == their_H[:, None]).any(1) | (theirs_HK == our_H[:, None]).any(1)
        ours_HK[:, i] = np.where(clash_H, our_H, their_H)
        theirs_HK[:, j] = np.where(clash_H, their_H, our_H)
    return experts_NK


def _strongest_partner(pairs_EE: Ints) -> float:
    load_E = pairs_EE.diagonal()
    partners_EE = pairs_EE - np.diag(load_E)
    active = load_E > 0
    return float((partners_EE.max(1)[active] / load_E[active]).mean())
