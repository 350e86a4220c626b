"""The measures of a document against numbers worked out by hand and against plain loops."""

import itertools
import math

import numpy as np
import pytest

from sra_ds.evaluation.coherence.entities import (
    any_shared,
    entity,
    entity_overlap,
    graph_score,
    shared_entities,
)
from sra_ds.evaluation.coherence.lexical import lexical, log_mattr
from sra_ds.evaluation.coherence.orders import ORDERS, other_orders, share_beaten
from sra_ds.evaluation.coherence.semantic import semantic, unrelated_cosine
from sra_ds.intervals import Estimate, mean, share

CHAIN = [{"a", "b"}, {"b", "c"}, {"c", "d"}, {"d", "e"}, {"e", "f"}]
SENTENCES = ["One a b.", "Two b c.", "Three c d.", "Four d e.", "Five e f."]


def test_the_share_of_others_that_is_beaten() -> None:
    assert share_beaten(2.0, [1, 1, 3, 2]) == 0.5 + 0.25 / 2
    assert share_beaten(2.0, [1]) == 1 and share_beaten(0.0, [1, 2]) == 0
    assert share_beaten(2.0, [2, 2, 2]) == 0, "a half would reward what has no order"
    assert share_beaten(2.0, []) == 0


def test_orders_are_those_of_the_set_of_sentences() -> None:
    orders = other_orders(SENTENCES)
    assert 15 < len(orders) <= ORDERS
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert all(order.tolist() != list(range(5)) for order in orders)
    read = {tuple(SENTENCES[i] for i in order) for order in orders}
    turned = SENTENCES[::-1]
    read_turned = {tuple(turned[i] for i in order) for order in other_orders(turned)}
    assert read - {tuple(turned)} == read_turned - {tuple(SENTENCES)}
    spaced = [f"  {s.replace(' ', '   ')}\n" for s in SENTENCES]
    assert np.array_equal(np.stack(orders), np.stack(other_orders(spaced)))
    assert other_orders(["Same."] * 4) == [] and other_orders(["One."]) == []


def test_the_entity_graph_by_hand() -> None:
    entities = [{"x", "y"}, {"y"}, {"x", "y", "z"}, set(), {"z"}]
    shared = shared_entities(entities)
    assert shared[0].tolist() == [2, 1, 2, 0, 0] and (shared == shared.T).all()
    # 0-1: 1/1, 0-2: 2/2, 1-2: 1/1, 2-4: 1/2
    assert graph_score(shared) == pytest.approx((1 + 1 + 1 + 0.5) / 5)
    # adjacent: 1/1, 1/1, an empty one twice
    assert entity_overlap(entities) == pytest.approx(2 / 4)
    assert any_shared(entities) and not any_shared([{"a"}, {"b"}, set()])


def test_entity_knows_a_chain_from_its_permutations() -> None:
    best = entity(SENTENCES, CHAIN)
    assert best > 0.9
    mixed = [1, 3, 0, 4, 2]
    assert entity([SENTENCES[i] for i in mixed], [CHAIN[i] for i in mixed]) < 0.5
    assert entity([s.replace(" ", "\n") for s in SENTENCES], CHAIN) == best


def test_entity_without_evidence() -> None:
    assert math.isnan(entity(["One."], [{"a"}])) and math.isnan(entity_overlap([{"a"}]))
    assert math.isnan(entity([], []))
    apart = [{name} for name in "abcde"]
    assert entity(SENTENCES, apart) == 0 and entity_overlap(apart) == 0
    assert entity(["Same."] * 5, [{"a"}] * 5) == 0


def test_semantic_by_hand() -> None:
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1], [0, 1]], np.float32)
    once = [False] * 4
    assert semantic(vectors, once, 0.0) == pytest.approx((0.6 + 0.8 + 1) / 3)
    assert semantic(vectors, once, 0.5) == pytest.approx((0.8 - 0.5) / 0.5)
    assert semantic(vectors, [False, False, False, True], 0.0) == pytest.approx((0.6 + 0.8) / 3)
    assert semantic(vectors, once, 0.9) == 0
    assert semantic(-vectors[::-1], once, -1.0) <= 1
    assert math.isnan(semantic(vectors[:1], [False], 0.0))
    assert math.isnan(semantic(vectors, once, float("nan")))


def test_the_cosine_of_unrelated_sentences_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    sizes, sources = [1, 6, 3, 2, 5], [4, 7, 4, 9, 7]
    documents = [rng.normal(size=(size, 8)).astype(np.float32) for size in sizes]
    pairs = [
        float(a @ b)
        for (x, i), (y, j) in itertools.permutations(zip(documents, sources, strict=True), 2)
        if i != j
        for a in x
        for b in y
    ]
    assert unrelated_cosine(documents, sources) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert math.isnan(unrelated_cosine(documents, [1] * 5)) and math.isnan(unrelated_cosine([], []))


def test_lexical_by_hand() -> None:
    content = [{"cat", "sit"}, {"cat", "sleep"}, {"dog"}, {"dog", "cat"}]
    words = list("abcdabcde")  # abcd bcda cdab dabc abcd bcde: five of six are different
    assert lexical(content, words) == pytest.approx(2 / 3 * 5 / 6)
    assert lexical([{"a"}] * 3, ["w"] * 6) == pytest.approx(1 / 3)
    assert math.isnan(lexical([{"a"}], words)) and math.isnan(lexical(content, words[:3]))


def test_the_moving_type_token_ratio() -> None:
    words = [f"w{(n * n) % 23}" for n in range(61)]
    ratios = [len(set(words[start : start + 50])) / 50 for start in range(12)]
    assert log_mattr(words) == pytest.approx(math.log(np.mean(ratios)))
    assert math.isnan(log_mattr(words[:49]))
    assert log_mattr([str(n) for n in range(50)]) == 0


def test_intervals_draw_whole_sources() -> None:
    rng = np.random.default_rng(1)
    effect = rng.normal(size=40)
    sources = [n for n in range(40) for _ in range(5)]
    together = mean(effect[sources].tolist(), sources)
    assert together.value == pytest.approx(effect.mean())
    assert together.high - together.low == pytest.approx(4 * 0.158 * effect.std(), rel=0.15)
    apart = mean(effect[sources].tolist(), range(200))
    assert together.high - together.low > 1.8 * (apart.high - apart.low)
    assert together == mean(effect[sources].tolist(), sources)


def test_means_and_shares_without_enough() -> None:
    nan = float("nan")
    assert mean([1.0, nan, 0.0], [0, 1, 2]).value == 0.5
    assert mean([nan, nan], [0, 1]).as_dict() == {"value": None, "low": None, "high": None}
    assert mean([], []).as_dict()["value"] is None
    assert mean([0.25, 0.75], [3, 3]).as_dict() == {"value": 0.5, "low": None, "high": None}
    assert share([2, 1], [4, 0], [0, 1]).value == 0.75
    assert share([1, 0, 3], [2, 0, 6], [0, 1, 2])[:3] == Estimate(0.5, 0.5, 0.5)
