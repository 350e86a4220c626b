"""Sentences of a text and the words in them, whether it is written as people do or as WikiText is.

WikiText parts punctuation from words, writes `@-@`, `@,@` and `@.@` for marks inside of them, `<unk>` for
rare ones and ` = Title = ` for headings. Headings are left out. A sentence keeps the form it had, which
is the one a model was trained on; `plain` gives the form that taggers and encoders were trained on.
Blanks and line ends only part words: how many there are changes nothing.
"""

import importlib.metadata
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from sra_ds.errors import BackendUnavailable

HEADING = re.compile(r"\s*=+ .* =+\s*$")
SENTENCE_END = re.compile(r"[.!?][\s\"'”’)\]]*$")
UNKNOWN = "<unk>"
INNER_MARK = re.compile(r" ?@([-,.])@ ?")
BLANK_BEFORE = re.compile(r" (?=[,;:!?)\]%]|\.(?: |$)|['’](?:s|t|m|re|ll|ve|d)\b|n['’]t\b)")
BLANK_AFTER = re.compile(r"(?<=[(\[$]) ")
TOKEN = re.compile(
    r"\w+?(?=n['’]t\b)|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b|\w+(?:-\w+)*|[^\w\s]", re.IGNORECASE
)


def paragraphs(text: str) -> list[str]:
    """The text in pieces that end with a line that ends a sentence, or before a blank one; a heading
    belongs to what it heads."""
    found, lines = [], list[str]()
    for line in text.splitlines(keepends=True):
        lines.append(line)
        blank_after_body = not line.strip() and any(map(_is_body, lines))
        if blank_after_body or SENTENCE_END.search(line):
            found.append("".join(lines))
            lines = []
    return [*found, "".join(lines)] if lines else found


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph that have a word. Raises `BackendUnavailable` without pysbd."""
    lines = filter(_is_body, paragraph.splitlines())
    body = " ".join(" ".join(lines).split())
    spans = _segmenter().segment(body.replace("@.@", "@,@"))  # a decimal point ends no sentence
    found = (body[span.start : span.end].strip() for span in spans)
    return [sentence for sentence in found if words(plain(sentence))]


def sentences_of(text: str) -> list[str]:
    """The sentences of all paragraphs."""
    return [sentence for paragraph in paragraphs(text) for sentence in sentences(paragraph)]


def plain(sentence: str) -> str:
    """The sentence as people write it, without what WikiText does not know."""
    text = " ".join(INNER_MARK.sub(r"\1", sentence).replace(UNKNOWN, " ").split())
    return BLANK_AFTER.sub("", BLANK_BEFORE.sub("", text))


def tokens(text: str) -> list[str]:
    """Words, clitics and marks of plain text, one by one, as the British National Corpus has them."""
    return TOKEN.findall(text)


def words(text: str) -> list[str]:
    """Those tokens of plain text that have a letter or digit, in lower case."""
    return [token.lower() for token in tokens(text) if any(map(str.isalnum, token))]


def splitter_name() -> str:
    """The splitter and its version. Raises `BackendUnavailable` where it is not installed."""
    _segmenter()
    return f"pysbd {importlib.metadata.version('pysbd')}"


def repeats(texts: Iterable[str]) -> list[bool]:
    """Whether each sentence has been there before, word for word."""
    seen: set[tuple[str, ...]] = set()
    found = []
    for text in texts:
        key = tuple(words(text))
        found.append(key in seen)
        seen.add(key)
    return found


@cache
def _segmenter() -> Any:
    try:
        import pysbd
    except ImportError:
        raise BackendUnavailable(
            "coherence needs pysbd to find sentences: pip install 'sra_ds[coherence]'"
        ) from None
    return pysbd.Segmenter(language="en", clean=False, char_span=True)


def _is_body(line: str) -> bool:
    return bool(line.strip()) and not HEADING.match(line)
