"""Byte-level BPE with one special token, `<|endoftext|>`: invertible, no unknown token, no padding."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sra_ds.errors import DataError

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn BPE merges; a small corpus may give fewer than `vocab_size` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_plain_text(tokenizer)


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Read a `tokenizer.json`; raises `DataError` if it is none, lacks the end-of-text token, has ids
    beyond `vocab_size` or does not give back the text it was given."""
    if not path.is_file():
        raise DataError(f"tokenizer {path} does not exist")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"tokenizer {path} is not a tokenizer.json ({error})") from None
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise DataError(f"tokenizer {path} has no {END_OF_TEXT} token")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:
        raise DataError(
            f"tokenizer {path} has ids up to {largest}, data.tokenizer.vocab_size is {vocab_size}"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _as_plain_text(tokenizer)
    if not _is_invertible(tokenizer):
        raise DataError(
            f"tokenizer {path} loses text: decode(encode(s)) != s; use a byte-level one"
        )
    return tokenizer


def _is_invertible(tokenizer: Tokenizer) -> bool:
    probe = "Trains 1,024 experts — naïve, cafe\u0301?\n\n\tYes. \U0001f642"
    try:
        ids = tokenizer.encode(probe).ids
        text: str = tokenizer.decode(ids, skip_special_tokens=False)
    except Exception:  # the library raises bare Exception, for text it has no token for
        return False
    return text == probe


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Id of the token that opens every document."""
    number = tokenizer.token_to_id(END_OF_TEXT)
    assert number is not None  # load and train make sure of it
    return number


def limit_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first texts up to `limit` UTF-8 bytes together."""
    used = 0
    for text in texts:
        yield text
        used += len(text.encode())
        if used >= limit:
            return


def _as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """`<|endoftext|>` inside a document is text, not a document boundary."""
    tokenizer.encode_special_tokens = True
    return tokenizer
