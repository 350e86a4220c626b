"""What each expert does: its tokens, its words and how coherent they are, its grammar, its partners.

Top tokens and words are those of largest PMI among what was *routed* to the expert; the vocabulary
nearest to its anchor stands apart, since it need not be the same.
"""

from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest, mannwhitneyu, norm
from tokenizers import Tokenizer

from sra_ds.analysis.anchors import AnchorSpace, nearest_tokens
from sra_ds.analysis.layers import Labels
from sra_ds.analysis.npmi import TOP_WORDS, Coherence
from sra_ds.analysis.statistics import RESAMPLES, SIGNIFICANT, Measured, with_adjusted_p
from sra_ds.analysis.syntax import CLASSES, FUNCTION_CLASSES
from sra_ds.analysis.tables import (
    SEED,
    Table,
    expert_label_share_E,
    make_table,
    table_from_counts,
    top_labels,
)
from sra_ds.analysis.traces import Trace
from sra_ds.metrics import is_dead

TOP_TOKENS = 10


class Profile(NamedTuple):
    """One expert of one layer; shares are between 0 and 1, NaN where the expert serves nothing."""

    layer: int
    expert: int
    kind: str
    """`idle`, `syntactic` (most of its words are of closed classes), `semantic` (its words are coherent
    beyond chance, p adjusted below 0.05) or `mixed`."""
    specialisation: str
    load: float
    """Share of the layer's routes."""
    dead_by_routes: bool
    dead_by_tokens: bool
    top_tokens: list[str]
    top_words: list[str]
    nearest_tokens: list[str]
    """Vocabulary nearest to the anchor; empty for a router without anchors."""
    coherence: Measured
    vocabulary_specialisation: float
    function_share: float
    classes: dict[str, float]
    """Share of each part of speech among its routes."""
    domains: dict[str, float]
    """Of each domain's routes, the share that comes here."""
    partner: int | None
    partner_share: float
    mean_gate: float
    mean_score: float
    mean_margin: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON and CSV, which have no NaN."""
        values = {k: v for k, v in self._asdict().items() if k != "coherence"}
        plain = {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in values.items()}
        return {**plain, "coherence": self.coherence.as_dict()}


class LayerTables(NamedTuple):
    """Routes of one layer by token type, word, part of speech and domain."""

    tokens: Table
    words: Table
    classes: Table
    domains_GE: NDArray[np.int64]


def least_routes(trace: Trace) -> int:
    """Routes a token or word needs before it can characterise an expert: 3 to 10, with the text."""
    return int(np.clip(trace.tokens // 100_000, 3, 10))


def layer_tables(trace: Trace, labels: Labels, experts_NK: NDArray[Any], layer: int) -> LayerTables:
    """Tables of some decisions; a word counts once for each expert that any of its tokens goes to."""
    units_N, words_M = labels.words.unit_of_token_N, labels.words.word_of_unit_M
    slots = trace.slots_L[layer]
    inside = np.flatnonzero(labels.words.word_of_token_N >= 0)
    keys = units_N[inside].astype(np.int64)[:, None] * slots + experts_NK[inside]
    unit_R, expert_R = np.divmod(np.unique(keys), slots)
    words = make_table(words_M[unit_R], expert_R[:, None], (len(labels.words.words_W), slots))
    class_N = labels.class_N
    tagged = np.flatnonzero(class_N >= 0)
    return LayerTables(
        table_from_counts(trace.counts(layer), trace.vocab_size, slots),
        words,
        make_table(class_N[tagged], experts_NK[tagged], (len(CLASSES), slots)),
        trace.domain_loads_LGE[layer, :, :slots],
    )


def measure_coherence(
    trace: Trace, labels: Labels, tables: list[LayerTables]
) -> tuple[list[list[list[int]]], list[list[Measured]], list[list[Measured]]]:
    """Top words of every expert of every layer, their coherence, and that of the untrained twins' top
    words; p adjusted over all experts of all layers."""
    least = least_routes(trace)
    own = [top_labels(t.words, least, TOP_WORDS) for t in tables]
    twins = []
    for layer in range(trace.layers):
        twin = layer_tables(trace, labels, np.asarray(trace.untrained_NLK[:, layer]), layer)
        twins.append(top_labels(twin.words, least, TOP_WORDS))
    words_M = labels.words.word_of_unit_M
    frequency_W = np.bincount(words_M[words_M >= 0], minlength=len(labels.words.words_W))
    coherence = Coherence(labels.words, labels.block_of_document, frequency_W)
    count = sum(trace.slots_L)
    everything = coherence.of([t for lists in (*own, *twins) for t in lists], least, count)
    halves = [iter(with_adjusted_p(half)) for half in (everything[:count], everything[count:])]
    by_layer = [[list(islice(half, slots)) for slots in trace.slots_L] for half in halves]
    return own, by_layer[0], by_layer[1]


def share_above_null(coherences: list[Measured], twins: list[Measured]) -> Measured:
    """Share of the experts whose coherence exceeds the 95 % null of their own word frequencies, with the
    interval of a binomial share. Chance is 5 % for routes that know nothing of the text; words of one
    passage belong together, so that one which deals out passages blindly has more. There is no p."""
    tested = [one for one in coherences if np.isfinite(one.p)]
    other = [one for one in twins if np.isfinite(one.p)]
    if not tested:
        return Measured(float("nan"))
    above = sum(one.value > one.null_95 for one in tested)
    twins_above = [one.value > one.null_95 for one in other]
    interval = binomtest(above, len(tested)).proportion_ci(method="wilson")
    return Measured(
        value=above / len(tested),
        chance=0.05,
        null_mean=0.05,
        null_95=0.05,
        untrained=float(np.mean(twins_above)) if twins_above else float("nan"),
        low=float(interval.low),
        high=float(interval.high),
    )


def coherence_over_untrained(coherences: list[Measured], twins: list[Measured]) -> Measured:
    """Probability that an expert's words exceed the coherence of other words of their frequencies by
    more than those of an expert of the untrained router on the same vectors do (ties half); chance is
    1/2, p that of Mann and Whitney's test, the interval resamples the experts of both."""
    own, other = _excesses(coherences), _excesses(twins)
    if not own.size or not other.size:
        return Measured(float("nan"), chance=0.5)
    wins = (own[:, None] > other) + 0.5 * (own[:, None] == other)
    rng = np.random.default_rng(SEED)
    resampled = [
        wins[rng.integers(own.size, size=own.size)][:, rng.integers(other.size, size=other.size)]
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile([part.mean() for part in resampled], [0.025, 0.975])
    spread = np.sqrt((own.size + other.size + 1) / (12 * own.size * other.size))
    return Measured(
        value=float(wins.mean()),
        chance=0.5,
        null_mean=0.5,
        null_95=float(0.5 + norm.ppf(0.95) * spread),
        low=float(low),
        high=float(high),
        p=float(mannwhitneyu(own, other, alternative="greater").pvalue),
    )


def excess(coherence: Measured) -> float:
    """Coherence over the mean of its null: common words are more coherent than rare ones, whatever
    expert they go to."""
    return coherence.value - coherence.null_mean


def _excesses(coherences: list[Measured]) -> NDArray[np.float64]:
    found = np.array([excess(one) for one in coherences])
    known: NDArray[np.float64] = found[np.isfinite(found)]
    return known


def profile_layer(
    trace: Trace,
    layer: int,
    tables: LayerTables,
    top_words: list[list[str]],
    coherences: list[Measured],
    space: AnchorSpace | None,
    tokenizer: Tokenizer,
) -> list[Profile]:
    """Profiles of the experts of one layer."""
    load_E, slots = trace.load_LE[layer], trace.slots_L[layer]
    least = least_routes(trace)
    tokens = [readable(tokenizer, ids) for ids in top_labels(tables.tokens, least, TOP_TOKENS)]
    near: list[list[str]] = [[] for _ in range(slots)]
    if space is not None:
        near = [readable(tokenizer, ids) for ids in nearest_tokens(space, TOP_TOKENS)[0]]
    classes_CE = _shares(tables.classes.dense())
    domains_GE = tables.domains_GE / tables.domains_GE.sum(1, keepdims=True).clip(min=1)
    vocabulary_E = expert_label_share_E(tables.tokens)
    partner_E, partner_share_E = _partners(trace.pairs_LEE[layer])
    means = {name: values_LE[layer] for name, values_LE in trace.expert_means.items()}
    dead_E = is_dead(torch.tensor(load_E)).tolist()
    hardly_E = is_dead(torch.tensor(load_E), trace.tokens).tolist()
    profiles = []
    for expert in range(slots):
        classes = {c: float(s) for c, s in zip(CLASSES, classes_CE[:, expert], strict=True)}
        function_share = sum(classes[name] for name in FUNCTION_CLASSES)
        kind = _kind(dead_E[expert], function_share, coherences[expert])
        domains = {d: float(s) for d, s in zip(trace.domains, domains_GE[:, expert], strict=True)}
        profiles.append(
            Profile(
                layer, expert, kind, _describe(kind, classes),
                float(load_E[expert] / max(load_E.sum(), 1)),
                dead_E[expert], hardly_E[expert],
                tokens[expert], top_words[expert], near[expert], coherences[expert],
                float(vocabulary_E[expert]), function_share, classes, domains,
                int(partner_E[expert]) if partner_share_E[expert] > 0 else None,
                float(partner_share_E[expert]),
                *(float(means[name][expert]) for name in ("gate", "score", "margin")),
            )
        )  # fmt: skip
    return profiles


def readable(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Tokens as people can tell them apart: the text, with a dot for a leading space."""
    texts = (tokenizer.decode([number], skip_special_tokens=False) for number in ids)
    return ["\u00b7" + text[1:] if text.startswith(" ") else text for text in texts]


def _kind(dead: bool, function_share: float, coherence: Measured) -> str:
    if dead:
        return "idle"
    if function_share > 0.5:
        return "syntactic"
    return "semantic" if coherence.p_adjusted < SIGNIFICANT else "mixed"


def _describe(kind: str, classes: dict[str, float]) -> str:
    """Kind and most frequent part of speech, for a table's column."""
    largest = max(classes, key=lambda name: classes[name])
    share = classes[largest]
    return f"{kind}: {largest} {share:.0%}" if share > 0 else kind


def _shares(counts_CE: NDArray[np.float64]) -> NDArray[np.float64]:
    shares_CE: NDArray[np.float64] = counts_CE / counts_CE.sum(0).clip(min=1)
    return shares_CE


def _partners(pairs_EE: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The expert that most often serves the same tokens, and of how many of them."""
    load_E = pairs_EE.diagonal()
    others_EE = pairs_EE - np.diag(load_E)
    return others_EE.argmax(1), others_EE.max(1) / load_E.clip(min=1)
