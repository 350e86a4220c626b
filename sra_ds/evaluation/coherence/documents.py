"""Where documents come from: passages of human text, and what models write after how those begin.

A source is an article, a file or what else the corpus counts as one text. A passage of it starts at a
paragraph and has the whole sentences that fit into as many tokens as a model is let write, so that human
and written documents are of about one length. Which passage of a source comes first is drawn, since how
texts open is a kind of text of its own. Where there are fewer sources than passages asked for, each gives
a second one, a third, and so on.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

from tokenizers import Tokenizer

from sra_ds.data.shards import TokenSplit
from sra_ds.errors import DataError
from sra_ds.evaluation.coherence.anchors import Sentences
from sra_ds.evaluation.coherence.orders import seeded
from sra_ds.evaluation.coherence.scoring import TextModel
from sra_ds.evaluation.coherence.sentences import (
    SENTENCE_END,
    paragraphs,
    sentences,
    sentences_of,
)

PROMPT_TOKENS = 64
TEXT_TOKENS = 256
FEWEST, MOST = 5, 20
"""Sentences of a document that is scored."""
DRAWN_FROM = 16
"""The first passages of a source."""
CHARACTERS_A_TOKEN = 64
"""No more are looked at for each token that is wanted: some texts are one endless line."""


class Passage(NamedTuple):
    """A stretch of a source."""

    source: int
    prompt: str
    """How it begins, headings and all."""
    sentences: Sentences


class Document(NamedTuple):
    """Sentences that are scored, and the number of the source that they, or their prompt, are from."""

    source: int
    sentences: Sentences


def human_passages(
    split: TokenSplit, tokenizer: Tokenizer, most: int, label: str = "the split"
) -> list[Passage]:
    """Up to `most` passages of a split: one of every source, then a second one of each. Raises
    `DataError` where no source has enough sentences."""
    sources = (
        _drawn(_passages(number, text, tokenizer))
        for number, text in enumerate(_texts(split, tokenizer))
    )
    found = list(islice(_in_turns(sources), most))
    if not found:
        raise DataError(
            f"{label}: no passage has {FEWEST} sentences within {TEXT_TOKENS} tokens; give longer prose "
            "in English, a paragraph a line"
        )
    return found


def written_documents(
    model: TextModel, passages: Sequence[Passage], seeds: int
) -> tuple[list[Document], int]:
    """Continuations of every prompt by each seed, and how many were too short to be scored."""
    prompts = [passage.prompt for passage in passages]
    drawn = [
        Document(passage.source, continued_sentences(written))
        for seed in range(seeds)
        for passage, written in zip(
            passages, model.continuations(prompts, TEXT_TOKENS, seed), strict=True
        )
    ]
    long_enough = [document for document in drawn if len(document.sentences) >= FEWEST]
    return long_enough, len(drawn) - len(long_enough)


def continued_sentences(written: str) -> Sentences:
    """Without the first, which began in the prompt, and the last if it has no end."""
    found = sentences_of(written)[1:]
    if found and not SENTENCE_END.search(found[-1]):
        found.pop()
    return found[:MOST]


def _texts(split: TokenSplit, tokenizer: Tokenizer) -> Iterator[str]:
    starts = [*split.documents["start"].tolist(), split.tokens]
    for start, end in pairwise(starts):
        ids = split.read(start + 1, end).tolist()
        yield tokenizer.decode(ids, skip_special_tokens=False)


def _in_turns(sources: Iterable[Iterator[Passage]]) -> Iterator[Passage]:
    """The first of each, then the second of each, and so on."""
    while sources:
        again = []
        for passages in sources:
            for passage in islice(passages, 1):
                yield passage
                again.append(passages)
        sources = again


def _drawn(passages: Iterator[Passage]) -> Iterator[Passage]:
    """In an order that their words decide."""
    found = list(islice(passages, DRAWN_FROM))
    order = seeded([passage.sentences[0] for passage in found], "passages").permutation(len(found))
    yield from (found[number] for number in order)


def _passages(number: int, text: str, tokenizer: Tokenizer) -> Iterator[Passage]:
    """The passages of a source, one after the other."""
    parts = paragraphs(text)
    at = 0
    while at < len(parts):
        start, kept, room = at, Sentences(), TEXT_TOKENS
        while at < len(parts) and room > 0 and len(kept) < MOST:
            for sentence in sentences(parts[at][: CHARACTERS_A_TOKEN * TEXT_TOKENS]):
                room -= len(tokenizer.encode(f" {sentence}").ids)
                if room >= 0 and len(kept) < MOST:
                    kept.append(sentence)
            at += 1
        if len(kept) >= FEWEST:
            yield Passage(number, _opening("".join(parts[start:at]), tokenizer), kept)


def _opening(text: str, tokenizer: Tokenizer) -> str:
    """The first tokens; a character that is cut in half is left out."""
    ids = tokenizer.encode(text[: CHARACTERS_A_TOKEN * PROMPT_TOKENS]).ids[:PROMPT_TOKENS]
    opening: str = tokenizer.decode(ids, skip_special_tokens=False)
    return opening.rstrip("\ufffd")
