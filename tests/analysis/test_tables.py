"""What is read off a table of labels against experts: closed forms, chance, null and intervals."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from sra_ds.analysis.layers import dealt_domains
from sra_ds.analysis.tables import (
    Routes,
    Table,
    expert_label_share_E,
    make_table,
    mean_divergence,
    mean_label_share,
    measure,
    mutual_information,
    normalised_mutual_information,
    pointwise_mutual_information,
    top_labels,
)

MEASURES = {
    "information": normalised_mutual_information,
    "divergence": mean_divergence,
    "share": mean_label_share,
}


def table_of(counts_VE: list[list[int]]) -> Table:
    """A table with these counts."""
    dense_VE = np.array(counts_VE)
    rows_P, experts_P = np.nonzero(dense_VE)
    return Table(rows_P, experts_P, dense_VE[rows_P, experts_P].astype(float), dense_VE.shape)


def entropy(counts: np.ndarray) -> float:
    """In bits, term by term."""
    return -sum(n / counts.sum() * math.log2(n / counts.sum()) for n in counts.ravel() if n)


def routes_of(experts_NK: np.ndarray, experts: int, blocks: int = 20) -> Routes:
    """Decisions whose untrained twin always takes the first experts, in equal blocks."""
    first_NK = np.tile(np.arange(experts_NK.shape[1]), (len(experts_NK), 1))
    return Routes(
        experts_NK, first_NK, np.arange(len(experts_NK)) * blocks // len(experts_NK), experts
    )


@pytest.mark.parametrize("tokens", [1, 63, 130])
def test_a_table_counts_every_route(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    labels_N, experts_NK = rng.integers(0, 7, tokens), rng.integers(0, 5, (tokens, 3))
    table = make_table(labels_N.astype(np.uint16), experts_NK.astype(np.uint8), (9, 5))
    by_hand_VE = np.zeros((9, 5))
    for label, chosen in zip(labels_N, experts_NK, strict=True):
        for expert in chosen:
            by_hand_VE[label, expert] += 1
    np.testing.assert_array_equal(table.dense(), by_hand_VE)
    np.testing.assert_array_equal(table.row_totals_V, by_hand_VE.sum(1))
    np.testing.assert_array_equal(table.load_E, by_hand_VE.sum(0))


def test_mutual_information_is_what_the_entropies_say() -> None:
    """I = H(label) + H(expert) - H(both), with an idle expert and a label that does not occur."""
    counts_VE = np.array([[5, 0, 2, 0], [0, 0, 0, 0], [1, 3, 1, 0], [7, 1, 4, 0]])
    parts = entropy(counts_VE.sum(1)) + entropy(counts_VE.sum(0))
    expected = parts - entropy(counts_VE)
    table = table_of(counts_VE.tolist())
    assert mutual_information(table) == pytest.approx(expected)
    assert normalised_mutual_information(table) == pytest.approx(2 * expected / parts)


def test_information_is_1_for_one_expert_per_label_and_0_for_none() -> None:
    assert normalised_mutual_information(table_of(np.diag([3, 8, 1]).tolist())) == pytest.approx(1)
    independent = np.outer([1, 2, 5], [4, 1, 7]).tolist()
    assert normalised_mutual_information(table_of(independent)) == pytest.approx(0, abs=1e-12)
    assert normalised_mutual_information(table_of([[3, 4]])) == pytest.approx(0)
    assert math.isnan(normalised_mutual_information(table_of([[3]])))


def test_divergence_is_1_bit_for_disjoint_and_0_for_equal_experts() -> None:
    """Idle experts count for nothing."""
    assert mean_divergence(table_of([[3, 0, 0], [0, 0, 9]])) == pytest.approx(1)
    assert mean_divergence(table_of([[3, 6], [1, 2]])) == pytest.approx(0, abs=1e-6)
    assert math.isnan(mean_divergence(table_of([[3, 0], [4, 0]])))


def test_divergence_is_the_mean_over_pairs() -> None:
    """By the definition: KL of each to the middle of the two, halved and added."""
    shares_EV = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.6, 0.4, 0.0]])

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        return sum(a * math.log2(a / b) for a, b in zip(p, q, strict=True) if a)

    pairs = [(shares_EV[a], shares_EV[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    expected = np.mean([(kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2 for p, q in pairs])
    counts_VE = (shares_EV.T * [20, 60, 100]).round().astype(int)
    assert mean_divergence(table_of(counts_VE.tolist())) == pytest.approx(expected, abs=1e-5)


def test_specialisation_is_the_mean_share_of_a_labels_routes() -> None:
    """(8/10 8 + 2/10 2 + 6/6 6) / 16; and by expert: (8/10 8 + 6/6 6) / 14, and 2/10."""
    table = table_of([[8, 2, 0], [6, 0, 0]])
    assert mean_label_share(table) == pytest.approx((6.4 + 0.4 + 6) / 16)
    np.testing.assert_allclose(expert_label_share_E(table), [12.4 / 14, 0.2, np.nan])


def test_pmi_is_the_formula_and_orders_labels() -> None:
    """log2 P(e, v) / (P(e) P(v)); fewer routes than asked for do not count; ties to the commoner."""
    counts_VE = np.array([[8, 2], [0, 4], [2, 2], [6, 1], [0, 8], [0, 2]])
    table = table_of(counts_VE.tolist())
    total = counts_VE.sum()
    expected = [
        math.log2(n * total / (counts_VE[v].sum() * counts_VE[:, e].sum()))
        for v, e, n in zip(table.rows_P, table.experts_P, table.counts_P, strict=True)
    ]
    np.testing.assert_allclose(pointwise_mutual_information(table), expected)
    assert top_labels(table, 2, 10) == [[3, 0, 2], [4, 1, 5, 2, 0]]
    assert top_labels(table, 3, 10) == [[3, 0], [4, 1]]
    assert top_labels(table, 1, 1) == [[3], [4]]
    assert top_labels(table_of([[0, 5, 0]]), 3, 10) == [[], [0], []]


@pytest.mark.parametrize("experts", [1, 4])
def test_all_experts_at_once_say_nothing(experts: int) -> None:
    """k = E: no information, shares of 1 / E, and nothing beyond the null."""
    labels_N = np.random.default_rng(0).integers(0, 9, 130)
    every_NK = np.tile(np.arange(experts), (130, 1))
    found = measure(MEASURES, labels_N, 9, routes_of(every_NK, experts))
    assert found["information"].value == pytest.approx(0, abs=1e-12) and found["information"].p == 1
    assert found["share"].value == pytest.approx(1 / experts) and found["share"].p == 1
    divergence = 0 if experts > 1 else math.nan
    assert found["divergence"].value == pytest.approx(divergence, abs=1e-6, nan_ok=True)


def test_independent_labels_are_within_the_null_and_others_beyond() -> None:
    """In 60 independent texts p is uniform and chance is met; with a rule it is as small as can be."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(60):
        labels_N, experts_NK = rng.integers(0, 9, 630), rng.integers(0, 5, (630, 2))
        found.append(measure(MEASURES, labels_N, 9, routes_of(experts_NK, 5)))
    for name in MEASURES:
        p_values = np.array([one[name].p for one in found])
        assert 0.35 < p_values.mean() < 0.65 and (p_values <= 0.05).mean() < 0.15, name
    ruled_NK = (labels_N[:, None] + [0, 1]) % 5
    for one in measure(MEASURES, labels_N, 9, routes_of(ruled_NK, 5)).values():
        assert one.p == 0.01 and one.value > one.null_95 and one.low > one.null_95


def test_the_untrained_twin_is_measured_alike() -> None:
    labels_N = np.random.default_rng(0).integers(0, 9, 130)
    routes = routes_of(labels_N[:, None] % 5, 5)
    found = measure(MEASURES, labels_N, 9, routes)
    same = make_table(labels_N, routes.untrained_NK, (9, 5))
    assert found["share"].untrained == mean_label_share(same) == 1
    assert found["information"].untrained == normalised_mutual_information(same) == 0


def test_intervals_of_information_cover_the_truth() -> None:
    """Labels with a rule that holds half of the time: I is known, and plug-in values are above it."""
    rng = np.random.default_rng(4)
    joint_VE = np.full((4, 4), 1 / 32) + np.diag([1 / 8] * 4)
    truth = 2 - entropy(joint_VE) / 2
    held = 0
    for _ in range(100):
        drawn = rng.choice(16, 1500, p=joint_VE.ravel())
        routes = routes_of((drawn % 4)[:, None], 4)
        found = measure({"information": normalised_mutual_information}, drawn // 4, 4, routes)
        held += found["information"].low <= truth <= found["information"].high
    assert 86 <= held <= 99


def test_a_text_in_one_block_has_no_interval() -> None:
    labels_N = np.arange(63) % 9
    found = measure(MEASURES, labels_N, 9, routes_of(labels_N[:, None] % 5, 5, blocks=1))
    assert all(math.isnan(one.low) and math.isfinite(one.value) for one in found.values())


def test_documents_that_differ_are_no_domains_that_differ() -> None:
    """Each document has habits of its own and a domain by lot: with domains dealt anew to documents p is
    small as often as it should be, with domains of tokens permuted nearly always."""
    lengths, small = np.full(40, 50), {"documents": 0, "tokens": 0}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        habit_D = rng.integers(0, 4, 40)
        experts_NK = (np.repeat(habit_D, lengths)[:, None] + (rng.random((2000, 1)) < 0.3)) % 4
        documents = np.zeros(40, [("start", "i8"), ("domain", "u2")])
        documents["start"] = np.arange(40) * 50
        documents["domain"] = rng.integers(0, 2, 40)
        trace = SimpleNamespace(documents=documents, tokens=2000)
        labels_N = np.repeat(documents["domain"].astype(np.int64), lengths)
        dealt_N = dealt_domains(trace, rng)
        assert (
            sorted(dealt_N) == sorted(labels_N) and (np.ptp(dealt_N.reshape(40, 50), 1) == 0).all()
        )
        named = {"information": normalised_mutual_information}
        for name, shuffled in (("documents", partial(dealt_domains, trace)), ("tokens", None)):
            found = measure(named, labels_N, 2, routes_of(experts_NK, 4), shuffled)
            small[name] += found["information"].p <= 0.05
    assert small["documents"] <= 3 and small["tokens"] >= 9
