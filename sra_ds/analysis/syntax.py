"""Parts of speech of the words behind the tokens, so that grammar and meaning can be told apart.

The tagger is HanTa (Wartena 2019, the Hanover tagger) with the English model that comes with it; its
tags are those of the British National Corpus (C5), mapped here onto coarse classes.
"""

import importlib.metadata

import numpy as np
from HanTa import HanoverTagger
from numpy.typing import NDArray
from tqdm import tqdm

from sra_ds.analysis.words import Words

CLASSES = (
    "noun", "name", "verb", "adjective", "adverb", "number",
    "determiner", "pronoun", "preposition", "conjunction", "auxiliary", "particle", "punctuation",
    "other",
)  # fmt: skip
FUNCTION_CLASSES = frozenset(CLASSES[6:13])
"""Closed classes and punctuation: what syntax is made of. The six before them carry meaning."""
BY_PREFIX = {
    "NN": "noun", "NP": "name", "VV": "verb", "AJ": "adjective", "AV": "adverb", "CRD": "number",
    "ORD": "number", "AT": "determiner", "DT": "determiner", "DPS": "determiner", "PN": "pronoun",
    "PRP": "preposition", "PRF": "preposition", "CJ": "conjunction", "VB": "auxiliary", "VD": "auxiliary",
    "VH": "auxiliary", "VM": "auxiliary", "TO": "particle", "XX": "particle", "EX": "pronoun",
    "POS": "particle", "PU": "punctuation",
}  # fmt: skip
SENTENCE_ENDS = frozenset(".!?")
LONGEST_SENTENCE = 100
SAMPLED_UNITS = 100_000


def tagger_name() -> str:
    """The tagger, its version and its model."""
    return f"HanTa {importlib.metadata.version('HanTa')}, morphmodel_en"


def tag_words(words: Words, most: int = SAMPLED_UNITS) -> NDArray[np.int8]:
    """Class of each unit, as its number in `CLASSES`, in every so many documents that about `most`
    units are tagged; -1 for the others."""
    tagger = HanoverTagger.HanoverTagger("morphmodel_en.pgz")
    classes_M = np.full(len(words.form_of_unit_M), -1, np.int8)
    step = max(1, -(-len(classes_M) // most))
    chosen = np.flatnonzero(words.document_of_unit_M % step == 0)
    sentence: list[int] = []
    for unit in tqdm(chosen.tolist(), "tagging", leave=False):
        document = words.document_of_unit_M[unit]
        if sentence and (
            len(sentence) >= LONGEST_SENTENCE
            or words.document_of_unit_M[sentence[0]] != document
            or words.form_of(sentence[-1]) in SENTENCE_ENDS
        ):
            _tag(tagger, words, sentence, classes_M)
            sentence = []
        sentence.append(unit)
    _tag(tagger, words, sentence, classes_M)
    return classes_M


def coarse_class(tag: str) -> int:
    """Number in `CLASSES` of a C5 tag; ambiguous ones (`NN1-VVB`) count as their first."""
    for length in (3, 2):
        if tag[:length] in BY_PREFIX:
            return CLASSES.index(BY_PREFIX[tag[:length]])
    return CLASSES.index("other")


def _tag(
    tagger: HanoverTagger.HanoverTagger,
    words: Words,
    sentence: list[int],
    classes_M: NDArray[np.int8],
) -> None:
    if not sentence:
        return
    forms = [words.form_of(unit) for unit in sentence]
    for unit, form, (_, _, tag) in zip(
        sentence, forms, tagger.tag_sent(forms, taglevel=1), strict=True
    ):
        is_mark = not any(map(str.isalnum, form))
        classes_M[unit] = CLASSES.index("punctuation") if is_mark else coarse_class(tag)
