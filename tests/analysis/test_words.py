"""Tokens become words again: characters split over tokens, accents, apostrophes, cut texts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from sra_ds.analysis.words import NO_UNIT, Words, read_words
from sra_ds.data.tokenizer import END_OF_TEXT, train_tokenizer

TraceOf = Callable[..., Any]
TEXTS = [
    "Don't you know? Rock\u2019n\u2019roll isn't dead, 'tis only \"asleep\" ...",
    "Na\u00efve caf\u00e9s, nai\u0308ve cafe\u0301s; \u041c\u043e\u0441\u043a\u0432\u0430 \u6771\u4eac "
    "\u0939\u093f\u0928\u094d\u0926\u0940.",
    "\U0001f642\U0001f642 fine \u2764\ufe0f \U0001f469\u200d\U0001f467 end",
    " \n\n\t two  spaces \u00a0and\u3000more \n",
    "",
    "   ",
    "snake_case __init__ x1 3.14 a-b",
    END_OF_TEXT + " inside",
    "The the THE \u0130stanbul",
]
UNITS = [
    ["Don't", "you", "know", "?", "Rock\u2019n\u2019roll", "isn't", "dead", ",", "'", "tis", "only", '"',
     "asleep", '"', ".", ".", "."],
    ["Na\u00efve", "caf\u00e9s", ",", "nai\u0308ve", "cafe\u0301s", ";",
     "\u041c\u043e\u0441\u043a\u0432\u0430", "\u6771\u4eac", "\u0939\u093f\u0928\u094d\u0926\u0940", "."],
    ["\U0001f642", "\U0001f642", "fine", "\u2764\ufe0f", "\U0001f469", "\u200d", "\U0001f467", "end"],
    ["two", "spaces", "and", "more"],
    [],
    [],
    ["snake_case", "__init__", "x1", "3", ".", "14", "a", "-", "b"],
    ["<", "|", "endoftext", "|", ">", "inside"],
    ["The", "the", "THE", "\u0130stanbul"],
]  # fmt: skip


def byte_tokenizer() -> Tokenizer:
    """Every character beyond ASCII is split over tokens."""
    return train_tokenizer(["a"], 257)


def merging_tokenizer() -> Tokenizer:
    """Most words are one token, and so are runs of spaces."""
    return train_tokenizer([text + " " + text for text in TEXTS], 420)


@pytest.fixture(params=[byte_tokenizer, merging_tokenizer], ids=["bytes", "merges"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param()


def units_of(words: Words, document: int) -> list[str]:
    """Units of a document as they are written."""
    own = np.flatnonzero(words.document_of_unit_M == document)
    return [words.form_of(int(unit)) for unit in own]


def units_of_tokens(text: str, units: list[str], tokenizer: Tokenizer) -> list[int]:
    """Of each token the unit of its first character that is no space, byte by byte."""
    unit_of_character, at = [NO_UNIT] * len(text), 0
    for number, unit in enumerate(units):
        at = text.index(unit, at) + len(unit)
        unit_of_character[at - len(unit) : at] = [number] * len(unit)
    character_of_byte = [i for i, character in enumerate(text) for _ in character.encode()]
    found, begin = [], 0
    for token in tokenizer.encode(text).tokens:  # written with one character for each byte
        own = character_of_byte[begin : begin + len(token)]
        begin += len(token)
        found.append(next((unit_of_character[i] for i in own if not text[i].isspace()), NO_UNIT))
    return found


def test_units_are_those_of_the_text(tokenizer: Tokenizer, trace_of: TraceOf) -> None:
    words = read_words(trace_of(tokenizer, TEXTS), tokenizer)
    assert [units_of(words, number) for number in range(len(TEXTS))] == UNITS


def test_every_token_belongs_to_the_unit_it_begins_in(
    tokenizer: Tokenizer, trace_of: TraceOf
) -> None:
    """Marks that open documents, and white space alone, belong to none."""
    words = read_words(trace_of(tokenizer, TEXTS), tokenizer)
    expected, before = [], 0
    for text, units in zip(TEXTS, UNITS, strict=True):
        own = units_of_tokens(text, units, tokenizer)
        expected += [NO_UNIT, *(NO_UNIT if unit == NO_UNIT else before + unit for unit in own)]
        before += len(units)
    assert words.unit_of_token_N.tolist() == expected


def test_a_token_of_two_units_belongs_to_the_first(trace_of: TraceOf) -> None:
    tokenizer = train_tokenizer(["a ... b ... c"] * 9, 270)
    trace = trace_of(tokenizer, ["a ... b"])
    assert len(trace.tokens_N) == 4  # the mark, `a`, ` ...`, ` b`
    words = read_words(trace, tokenizer)
    assert units_of(words, 0) == ["a", ".", ".", ".", "b"]
    assert words.unit_of_token_N.tolist() == [NO_UNIT, 0, 1, 4]


def test_case_is_one_word_and_punctuation_none(tokenizer: Tokenizer, trace_of: TraceOf) -> None:
    words = read_words(trace_of(tokenizer, ["The the, THE! __init__ 7"]), tokenizer)
    assert words.forms_F == ["The", "the", ",", "THE", "!", "__init__", "7"]
    assert words.words_W == ["the", "__init__", "7"]
    assert words.word_of_form_F.tolist() == [0, 0, NO_UNIT, 0, NO_UNIT, 1, 2]
    assert words.word_of_unit_M.tolist() == words.word_of_form_F.tolist()
    numbers = set(words.word_of_token_N.tolist())
    assert numbers == {NO_UNIT, 0, 1, 2}


def test_a_text_may_be_cut_anywhere(tokenizer: Tokenizer, trace_of: TraceOf) -> None:
    """Also within a character: what comes before the cut is read as if it had not been."""
    texts = [TEXTS[0], TEXTS[1], TEXTS[2]]
    whole_trace = trace_of(tokenizer, texts)
    whole = read_words(whole_trace, tokenizer)
    for tokens in range(1, whole_trace.tokens):
        cut = read_words(trace_of(tokenizer, texts, tokens), tokenizer)
        ends = np.flatnonzero(np.diff(whole.unit_of_token_N[:tokens]))
        sure = int(ends[-1]) + 1 if ends.size else 0
        np.testing.assert_array_equal(
            cut.unit_of_token_N[:sure], whole.unit_of_token_N[:sure], str(tokens)
        )
        known = int(whole.unit_of_token_N[:sure].max(initial=NO_UNIT)) + 1
        assert [cut.form_of(u) for u in range(known)] == [whole.form_of(u) for u in range(known)]
        assert cut.unit_of_token_N.max(initial=NO_UNIT) < len(cut.form_of_unit_M)


def test_a_trace_of_marks_alone_has_no_words(tokenizer: Tokenizer, trace_of: TraceOf) -> None:
    words = read_words(trace_of(tokenizer, ["", "", ""]), tokenizer)
    assert words.unit_of_token_N.tolist() == words.word_of_token_N.tolist() == [NO_UNIT] * 3
    assert words.words_W == [] and len(words.form_of_unit_M) == 0


def test_many_documents_are_read_in_batches(tokenizer: Tokenizer, trace_of: TraceOf) -> None:
    """More than are decoded at once: each has its own units, in order."""
    texts = [f"number {number} is here" for number in range(130)]
    words = read_words(trace_of(tokenizer, texts), tokenizer)
    assert words.document_of_unit_M.tolist() == [n for n in range(130) for _ in range(4)]
    assert [units_of(words, n) for n in range(130)] == [text.split() for text in texts]
