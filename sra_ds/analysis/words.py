"""The words behind traced tokens: BPE pieces are put together again before anything is said of meaning.

A unit is a word (letters with their accents, digits, inner apostrophes) or one mark of punctuation. A
token belongs to the unit that holds its first character that is not a space.

Letters: N tokens, M units in the order of the text, F forms (units as written), W words (lower case).
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

ACCENTS = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "M")
"""Combining characters, which Python's `\\w` leaves out: they belong to the character before them."""
LETTERS = rf"\w[\w{ACCENTS}]*"
UNIT = re.compile(rf"{LETTERS}(?:['\u2019]{LETTERS})*|[^\w\s][{ACCENTS}]*")
DOCUMENTS_AT_ONCE = 64
NO_UNIT = -1


class TokenText(Protocol):
    """A text as tokens, whose documents say where they start."""

    @property
    def tokens_N(self) -> NDArray[Any]: ...

    @property
    def documents(self) -> NDArray[Any]: ...

    @property
    def tokens(self) -> int: ...


class Words(NamedTuple):
    """Every unit of a traced text. Punctuation has forms, but is no word."""

    unit_of_token_N: NDArray[np.int32]
    """`NO_UNIT` for white space and end marks."""
    form_of_unit_M: NDArray[np.int32]
    document_of_unit_M: NDArray[np.int32]
    forms_F: list[str]
    word_of_form_F: NDArray[np.int32]
    """`NO_UNIT` for punctuation."""
    words_W: list[str]

    def form_of(self, unit: int) -> str:
        """A unit as it is written."""
        return self.forms_F[int(self.form_of_unit_M[unit])]

    @property
    def word_of_unit_M(self) -> NDArray[np.int32]:
        """`NO_UNIT` for punctuation."""
        return self.word_of_form_F[self.form_of_unit_M]

    @property
    def word_of_token_N(self) -> NDArray[np.int32]:
        """`NO_UNIT` for what is no part of a word."""
        return of_units(self.word_of_unit_M, self.unit_of_token_N)


def of_units(values_M: NDArray[Any], unit_of_token_N: NDArray[np.int32]) -> NDArray[Any]:
    """Each token's value of a property of units; -1 for what is part of none."""
    return np.append(values_M, values_M.dtype.type(NO_UNIT))[unit_of_token_N]


def read_words(trace: TokenText, tokenizer: Tokenizer) -> Words:
    """Decode the documents and find their units."""
    starts = [*trace.documents["start"].tolist(), trace.tokens]
    unit_of_token_N = np.full(trace.tokens, NO_UNIT, np.int32)
    number_of_form: dict[str, int] = {}
    forms: list[NDArray[np.int32]] = []
    documents: list[NDArray[np.int32]] = []
    units = 0
    bar = tqdm(desc="reading words", total=len(trace.documents), leave=False)
    for first, texts in _decoded(trace, tokenizer, starts):
        encodings = tokenizer.encode_batch(texts)
        for number, (text, encoding) in enumerate(zip(texts, encodings, strict=True), first):
            begin = starts[number] + 1  # after the mark that opens the document
            traced_T = trace.tokens_N[begin : starts[number + 1]]
            spans = [match.span() for match in UNIT.finditer(text)]
            found_T = _units_of_tokens(text, spans, encoding.offsets)
            agree = _common_prefix(encoding.ids, traced_T)
            own_T = found_T[:agree]
            unit_of_token_N[begin : begin + agree] = np.where(own_T >= 0, own_T + units, NO_UNIT)
            written = (text[a:b] for a, b in spans)
            numbers = [number_of_form.setdefault(u, len(number_of_form)) for u in written]
            forms.append(np.array(numbers, np.int32))
            documents.append(np.full(len(spans), number, np.int32))
            units += len(spans)
            bar.update()
    bar.close()
    words_W, word_of_form_F = _lower_case(list(number_of_form))
    empty = [np.empty(0, np.int32)]
    return Words(
        unit_of_token_N,
        np.concatenate(forms or empty),
        np.concatenate(documents or empty),
        list(number_of_form),
        word_of_form_F,
        words_W,
    )


def _decoded(
    trace: TokenText, tokenizer: Tokenizer, starts: list[int]
) -> Iterator[tuple[int, list[str]]]:
    """Texts of some documents at a time, with the number of the first."""
    for first in range(0, len(trace.documents), DOCUMENTS_AT_ONCE):
        last = min(first + DOCUMENTS_AT_ONCE, len(trace.documents))
        ids = [
            trace.tokens_N[a + 1 : b].tolist()
            for a, b in zip(starts[first:last], starts[first + 1 : last + 1], strict=True)
        ]
        yield first, tokenizer.decode_batch(ids, skip_special_tokens=False)


def _units_of_tokens(
    text: str, spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]
) -> NDArray[np.int64]:
    """Number of the unit each token belongs to, within the document."""
    if not spans or not offsets:
        return np.full(len(offsets), NO_UNIT, np.int64)
    starts_U, ends_U = np.array(spans).T
    first_T, end_T = np.array(offsets).T
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    spaces = [c for c in np.unique(characters).tolist() if chr(c).isspace()]
    written = np.flatnonzero(~np.isin(characters, spaces))
    place_T = np.searchsorted(written, first_T)  # of the first character that is not a space
    at_T = np.append(written, len(text))[place_T]
    unit_T = np.searchsorted(starts_U, at_T, side="right") - 1
    inside_T = (unit_T >= 0) & (at_T < end_T) & (at_T < ends_U[unit_T])
    return np.where(inside_T, unit_T, NO_UNIT)


def _common_prefix(ids: list[int], traced_T: NDArray[np.integer]) -> int:
    """Tokens up to the first that differs: a text that was cut off may end in half a character."""
    length = min(len(ids), len(traced_T))
    differ = np.flatnonzero(np.array(ids[:length], np.int64) != traced_T[:length])
    return int(differ[0]) if differ.size else length


def _lower_case(forms_F: list[str]) -> tuple[list[str], NDArray[np.int32]]:
    """Words in lower case, and the word of each form."""
    number_of_word: dict[str, int] = {}
    word_of_form = [
        number_of_word.setdefault(form.lower(), len(number_of_word))
        if form[0].isalnum() or form[0] == "_"
        else NO_UNIT
        for form in forms_F
    ]
    return list(number_of_word), np.array(word_of_form, np.int32)
