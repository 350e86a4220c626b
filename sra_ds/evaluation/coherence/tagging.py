"""What a sentence speaks of: lemmas of its nouns and names (the entities) and of all words with content.

The tagger is HanTa (Wartena 2019) with the English model that comes with it, whose tags are those of the
British National Corpus (C5). It does not parse: which noun is subject or object is not known.
"""

import importlib.metadata
from typing import NamedTuple

from HanTa import HanoverTagger

from sra_ds.evaluation.coherence.sentences import plain, tokens

MODEL = "morphmodel_en.pgz"
ENTITY_TAGS = ("NN", "NP")
CONTENT_TAGS = (*ENTITY_TAGS, "VV", "AJ")
UNKNOWN_TAGS = ("!!!", "UNC")
"""A capital makes a name of what is tagged so."""


class Tagged(NamedTuple):
    """Lemmas of a sentence in lower case."""

    entities: frozenset[str]
    content: frozenset[str]
    """The entities, and lexical verbs and adjectives."""


class Word(NamedTuple):
    """One token as it is tagged."""

    form: str
    lemma: str
    tag: str

    @property
    def is_entity(self) -> bool:
        """Whether it is a noun or a name of at least two letters."""
        unknown_name = self.tag in UNKNOWN_TAGS and self.form[:1].isupper()
        return _has_letters(self.lemma) and (self.tag.startswith(ENTITY_TAGS) or unknown_name)

    @property
    def is_content(self) -> bool:
        """Whether it carries meaning of its own."""
        return self.is_entity or (_has_letters(self.lemma) and self.tag.startswith(CONTENT_TAGS))


class Tagger:
    """Tags every distinct sentence once."""

    name = f"HanTa {importlib.metadata.version('HanTa')}, {MODEL}"

    def __init__(self) -> None:
        self._hanta = HanoverTagger.HanoverTagger(MODEL)
        self._known: dict[str, Tagged] = {}

    def __call__(self, sentence: str) -> Tagged:
        """What a sentence speaks of."""
        text = plain(sentence)
        if text not in self._known:
            found = self.words(tokens(text))
            entities = frozenset(word.lemma for word in found if word.is_entity)
            content = frozenset(word.lemma for word in found if word.is_content)
            self._known[text] = Tagged(entities, content)
        return self._known[text]

    def words(self, forms: list[str]) -> list[Word]:
        """The tokens of a sentence with lemma and tag."""
        found = self._hanta.tag_sent(forms, taglevel=1) if forms else []
        return [Word(form, lemma.lower(), tag) for form, lemma, tag in found]


def _has_letters(lemma: str) -> bool:
    return sum(map(str.isalpha, lemma)) >= 2
