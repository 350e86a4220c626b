"""Coherence of lists of words: windows by hand, gensim's C_NPMI, chance, and intervals."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from gensim.corpora import Dictionary
from gensim.models import CoherenceModel

from sra_ds.analysis import npmi as sra_npmi
from sra_ds.analysis.npmi import (
    EPS,
    FIRST_DRAWS,
    Coherence,
    c_npmi,
    count_windows,
    npmi,
)
from sra_ds.analysis.statistics import SIGNIFICANT, block_of_documents, draws_of_null
from sra_ds.analysis.words import NO_UNIT, Words

WINDOW, VOCABULARY = 10, 60
LENGTHS = [1, 2, 3, 9, 10, 11, 12, 40, 130, 0, 63]


def zipf_documents(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Documents of word numbers; low ones are common, so that windows hold words twice."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, VOCABULARY + 1)
    return [rng.choice(VOCABULARY, n, p=shares / shares.sum()) for n in lengths]


def unrepeated(document: np.ndarray) -> np.ndarray:
    """Without the words that stood among the nine before them."""
    kept: list[int] = []
    for word in document.tolist():
        if word not in kept[-WINDOW + 1 :]:
            kept.append(word)
    return np.array(kept, np.int64)


def windows_by_hand(documents: list[list[int]]) -> list[set[int]]:
    """What every window of ten words holds; a shorter document is one window."""
    return [
        set(document[first : first + WINDOW])
        for document in documents
        if document
        for first in range(max(1, len(document) - WINDOW + 1))
    ]


def words_of(documents: list[list[str]]) -> Words:
    """Units as `read_words` gives them; a comma is punctuation."""
    units = [unit for document in documents for unit in document]
    forms = list(dict.fromkeys(units))
    words = [form for form in forms if form != ","]
    return Words(
        np.arange(len(units), dtype=np.int32),
        np.array([forms.index(unit) for unit in units], np.int32),
        np.repeat(np.arange(len(documents)), [len(d) for d in documents]).astype(np.int32),
        forms,
        np.array([words.index(f) if f != "," else NO_UNIT for f in forms], np.int32),
        words,
    )


def coherence_of(documents: list[list[str]], blocks: int) -> tuple[Coherence, dict[str, int]]:
    """The measure over a text cut into blocks, and the number of each word."""
    words = words_of(documents)
    sizes = [len(document) for document in documents]
    block_D = block_of_documents(np.cumsum([0, *sizes[:-1]]), sum(sizes), blocks)
    numbers_M = words.word_of_unit_M
    frequency_W = np.bincount(numbers_M[numbers_M >= 0], minlength=len(words.words_W))
    number = {word: n for n, word in enumerate(words.words_W)}
    return Coherence(words, block_D, frequency_W), number


def random_text(seed: int, documents: int = 120, length: int = 63) -> list[list[str]]:
    """Words drawn independently of each other, half of them five times as common."""
    rng = np.random.default_rng(seed)
    shares = np.repeat([5.0, 1.0], 30)
    drawn = rng.choice(60, (documents, length), p=shares / shares.sum())
    return [[f"w{number}" for number in row] for row in drawn.tolist()]


def text_with_company(rng: np.random.Generator) -> tuple[list[list[str]], list[str]]:
    """Random text in which six words stand together in every fourth document, and the six."""
    texts = random_text(3)
    planted = [f"together{number}" for number in range(6)]
    for text in texts[::4]:
        at = int(rng.integers(0, len(text) - 6))
        text[at : at + 6] = rng.permutation(planted).tolist()
    return texts, planted


def test_windows_hold_what_they_hold_by_hand() -> None:
    """Documents shorter than a window, as long, longer, and empty; words that are not counted."""
    documents = [*zipf_documents(LENGTHS), np.array([-1, -1, 3]), np.array([-1] * 12)]
    found = count_windows(documents, VOCABULARY + 1)
    windows = windows_by_hand([document.tolist() for document in documents])
    assert found.windows == len(windows)
    single = Counter(word for window in windows for word in window if word >= 0)
    pairs = Counter(
        pair for window in windows for pair in combinations(sorted(w for w in window if w >= 0), 2)
    )
    pairs_WW = found.pairs_WW.toarray()
    for a in range(VOCABULARY + 1):
        assert found.single_W[a] == pairs_WW[a, a] == single[a]
        for b in range(a):
            assert pairs_WW[a, b] == pairs_WW[b, a] == pairs[b, a]


def test_no_text_has_no_windows() -> None:
    found = count_windows([], 0)
    assert (found.windows, found.single_W.tolist(), found.pairs_WW.shape) == (0, [], (0, 0))


def test_npmi_of_pairs_is_the_formula() -> None:
    """Two that always meet have 1, independent ones 0; 0, too, where one does not occur."""
    together, apart, absent = npmi(
        np.array([20.0, 4.0, 0.0]), np.array([20.0, 20.0, 0.0]), np.array([20.0, 20.0, 9.0]), 100.0
    )
    assert together == pytest.approx(1.0, abs=1e-9)
    assert apart == pytest.approx(0.0, abs=1e-9)
    assert absent == 0.0
    never_together = npmi(np.array([0.0]), np.array([50.0]), np.array([20.0]), 100.0)
    assert never_together == pytest.approx(math.log(EPS / 0.1) / -math.log(EPS))


def test_c_npmi_is_gensims() -> None:
    """To 1e-6. Gensim skips documents without any listed word, and loses a word that stands twice in a
    window when the first leaves it: here each document has one, and no window has one twice."""
    documents = [unrepeated(document) for document in zipf_documents(6 * LENGTHS)]
    rng = np.random.default_rng(1)
    topics = [rng.choice(VOCABULARY, 10, replace=False).tolist() for _ in range(8)]
    topics += [list(range(10)), list(range(30, 40))]
    texts = [[str(word) for word in document] for document in documents if len(document)]
    listed = {str(word) for topic in topics for word in topic}
    assert all(listed & set(text) for text in texts) and listed <= {w for t in texts for w in t}
    model = CoherenceModel(
        topics=[[str(word) for word in topic] for topic in topics],
        texts=texts,
        dictionary=Dictionary(texts),
        coherence="c_npmi",
        topn=10,
        window_size=WINDOW,
        processes=1,
    )
    counts = count_windows(documents, VOCABULARY)
    found = [c_npmi(topic, counts) for topic in topics]
    np.testing.assert_allclose(found, model.get_coherence_per_topic(), rtol=0, atol=1e-6)
    assert max(found) - min(found) > 0.05


def test_lists_of_fewer_than_two_words_have_none() -> None:
    counts = count_windows(zipf_documents([40]), VOCABULARY)
    assert math.isnan(c_npmi([], counts)) and math.isnan(c_npmi([3], counts))
    measure, _ = coherence_of(random_text(0, 30), 10)
    empty, one = measure.of([[], [3]], 3, tests=2)
    assert all(math.isnan(number) for found in (empty, one) for number in (found.value, found.p))


def test_values_over_blocks_are_those_of_the_whole_text() -> None:
    """Punctuation takes no place in a window, rare words that are in no list do."""
    rng = np.random.default_rng(2)
    texts = [[f"w{word}" for word in document] for document in zipf_documents([40] * 30)]
    with_commas = [
        [u for w in text for u in ([w, ","] if rng.random() < 0.3 else [w])] for text in texts
    ]
    measure, number = coherence_of(with_commas, 7)
    topics = [["w0", "w1", "w2"], ["w3", "w20", "w40", "w5"]]
    found = measure.of([[number[word] for word in topic] for topic in topics], least=3, tests=2)
    numbered = [np.array([number[word] for word in text]) for text in texts]
    counts = count_windows(numbered, len(number))
    for topic, one in zip(topics, found, strict=True):
        assert one.value == pytest.approx(c_npmi([number[w] for w in topic], counts), abs=1e-12)
        assert one.low < one.value < one.high
        assert one.chance == 0


def test_words_that_meet_stand_out_of_the_null_and_others_do_not() -> None:
    """In random text the p of random lists is uniform; a planted list has the smallest p there is."""
    rng = np.random.default_rng(4)
    texts, planted = text_with_company(rng)
    measure, number = coherence_of(texts, 20)
    lists = [rng.choice(60, 6, replace=False) for _ in range(300)]
    topics = [[number[f"w{word}"] for word in words] for words in lists]
    *others, own = measure.of([*topics, [number[word] for word in planted]], least=3, tests=1)
    assert own.value > 0.5 and own.low > own.null_95
    assert own.p == pytest.approx(1 / (FIRST_DRAWS + 1))
    p_values = np.array([one.p for one in others])
    assert 0.01 < (p_values <= 0.05).mean() < 0.09
    assert 0.4 < p_values.mean() < 0.6


def test_one_list_that_stands_out_of_many_is_drawn_against_as_often_as_its_adjustment_needs() -> (
    None
):
    """Alone among 100 tests, it stays below 0.05 adjusted; the p of others are the first draws'."""
    rng = np.random.default_rng(4)
    texts, planted = text_with_company(rng)
    measure, number = coherence_of(texts, 20)
    scattered = [number[word] for word in ("w1", "w12", "w33", "w47", "w8", "w21")]
    own, other = measure.of([[number[word] for word in planted], scattered], least=3, tests=100)
    assert own.p == pytest.approx(1 / (1 + draws_of_null(100)))
    assert own.p * 100 < SIGNIFICANT
    assert other.p > SIGNIFICANT
    assert (other.p * (1 + FIRST_DRAWS)) % 1 == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("pool", [2048, 130])
def test_the_null_has_the_frequencies_of_the_list(
    pool: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rare words meet less often than chance has it: with them in its null, any list of common words
    would be coherent. Half of the text is 24 common words, fewer than the null has neighbours; they
    are in its pool, too, where that does not hold every word."""
    monkeypatch.setattr(sra_npmi, "POOL_WORDS", pool)
    rng = np.random.default_rng(5)
    shares = np.repeat([1 / 24, 1 / 600], [24, 600])
    drawn = rng.choice(624, (100, 60), p=shares / shares.sum())
    measure, number = coherence_of([[f"w{n}" for n in row] for row in drawn.tolist()], 10)
    lists = [rng.choice(24, 6, replace=False) for _ in range(200)]
    found = measure.of(
        [[number[f"w{word}"] for word in words] for words in lists], least=3, tests=1
    )
    p_values = np.array([one.p for one in found])
    assert (p_values <= 0.05).mean() < 0.09
    assert 0.4 < p_values.mean() < 0.65


def test_a_text_in_one_block_has_no_interval() -> None:
    measure, _ = coherence_of(random_text(6, 10), 1)
    (found,) = measure.of([[0, 1, 2]], least=3, tests=1)
    assert math.isfinite(found.value) and math.isnan(found.low) and math.isnan(found.high)
