"""Parts of speech of units: known sentences, marks, odd text, and the share that is tagged."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sra_ds.analysis.syntax import CLASSES, FUNCTION_CLASSES, coarse_class, tag_words
from sra_ds.analysis.words import Words, read_words
from sra_ds.data.tokenizer import train_tokenizer

WordsOf = Callable[[list[str]], Words]
TOKENIZER = train_tokenizer(["a"], 257)


@pytest.fixture
def words_of(trace_of: Callable[..., Any]) -> WordsOf:
    """Units of some documents."""
    return lambda documents: read_words(trace_of(TOKENIZER, documents), TOKENIZER)


def classes_of(words: Words) -> dict[str, str]:
    """Class of each form."""
    found = tag_words(words)
    return {words.form_of(unit): CLASSES[found[unit]] for unit in range(len(found))}


def test_classes_of_plain_sentences(words_of: WordsOf) -> None:
    """Also where a sentence follows on another."""
    found = classes_of(
        words_of(
            [
                "In March the three dogs quickly saw her green house. They have not gone to "
                "London, and he walks slowly!",
                "We can run.",
            ]
        )
    )
    assert found == {
        "In": "preposition", "March": "name", "the": "determiner", "three": "number", "dogs": "noun",
        "quickly": "adverb", "saw": "verb", "her": "determiner", "green": "adjective", "house": "noun",
        ".": "punctuation", "They": "pronoun", "have": "auxiliary", "not": "particle", "gone": "verb",
        "to": "preposition", "London": "name", ",": "punctuation", "and": "conjunction", "he": "pronoun",
        "walks": "verb", "slowly": "adverb", "!": "punctuation", "We": "pronoun", "can": "auxiliary",
        "run": "verb",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("NN1-VVB", "noun"),
        ("NP0", "name"),
        ("VVZ", "verb"),
        ("VBZ", "auxiliary"),
        ("PRP", "preposition"),
        ("PNQ", "pronoun"),
        ("DPS", "determiner"),
        ("PUN", "punctuation"),
        ("POS", "particle"),
        ("CRD", "number"),
        ("ITJ", "other"),
        ("", "other"),
    ],
)
def test_tags_of_the_corpus_become_classes(tag: str, expected: str) -> None:
    assert CLASSES[coarse_class(tag)] == expected


def test_function_classes_are_the_closed_ones() -> None:
    content = {"noun", "name", "verb", "adjective", "adverb", "number", "other"}
    assert set(CLASSES) == content | FUNCTION_CLASSES and not content & FUNCTION_CLASSES


def test_marks_are_punctuation_and_odd_text_is_tagged(words_of: WordsOf) -> None:
    """Symbols, emoji, underscores, half a character, a word of 300 letters, a sentence without end."""
    marks = ["\U0001f642", "\u2764\ufe0f", "\ufffd", "_", "__", "\u200d", "|", "(", "\u201c"]
    words = words_of([" ".join([*marks, "x" * 300, *["on"] * 250]), "", "\u6771\u4eac \u0301"])
    classes_M = tag_words(words)
    assert (classes_M >= 0).all()
    assert {CLASSES[number] for number in classes_M[: len(marks)]} == {"punctuation"}


def test_a_sample_is_of_whole_documents_all_over_the_text(words_of: WordsOf) -> None:
    """Every third of 30 documents, where a third of the units is asked for."""
    words = words_of(["He saw the dog."] * 30)
    classes_M = tag_words(words, most=50)
    tagged_D = classes_M.reshape(30, 5) >= 0
    np.testing.assert_array_equal(tagged_D.all(1), np.arange(30) % 3 == 0)
    np.testing.assert_array_equal(tagged_D.any(1), tagged_D.all(1))
    assert (tag_words(words, most=150) >= 0).all()
