"""What the scores of a text are read against: the human text, and four ways to spoil it.

All keep the number of sentences. Words are exchanged within what stands around them, so that marks stay
where they are.
"""

import re
import string
from collections.abc import Callable, Iterator

from sra_ds.evaluation.coherence.orders import other_orders, seeded
from sra_ds.evaluation.coherence.sentences import UNKNOWN

WORD = re.compile(rf"{re.escape(UNKNOWN)}|\w+")
Sentences = list[str]


def human(sentences: Sentences) -> Sentences:
    """As it is."""
    return sentences


def sentence_shuffled(sentences: Sentences) -> Sentences:
    """The same sentences in another order, if there is one that reads otherwise."""
    order = next(iter(other_orders(sentences)), range(len(sentences)))
    return [sentences[i] for i in order]


def word_shuffled(sentences: Sentences) -> Sentences:
    """The words of the document in any order, as many in each sentence as before."""
    words = [word for sentence in sentences for word in WORD.findall(sentence)]
    order = seeded(sentences, "words").permutation(len(words))
    return _with_words(sentences, (words[i] for i in order))


def looped(sentences: Sentences) -> Sentences:
    """The first sentence over and over."""
    return sentences[:1] * len(sentences)


def gibberish(sentences: Sentences) -> Sentences:
    """Words of random letters, as long as those of the document."""
    rng = seeded(sentences, "letters")
    lengths = (len(word) for sentence in sentences for word in WORD.findall(sentence))
    letters = list(string.ascii_lowercase)
    return _with_words(sentences, ("".join(rng.choice(letters, length)) for length in lengths))


def _with_words(sentences: Sentences, words: Iterator[str]) -> Sentences:
    return [WORD.sub(lambda _: next(words), sentence) for sentence in sentences]


ANCHORS: dict[str, Callable[[Sentences], Sentences]] = {
    "human": human,
    "sentence_shuffled": sentence_shuffled,
    "word_shuffled": word_shuffled,
    "looped": looped,
    "gibberish": gibberish,
}
