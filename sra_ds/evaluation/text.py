"""Held-out text of a run: a split of its corpus, or files of the user's own in its tokens."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sra_ds.data.files import list_files
from sra_ds.data.prepare import prepare, split_from_files
from sra_ds.data.shards import TokenCorpus, TokenSplit
from sra_ds.errors import DataError
from sra_ds.inference.load import LoadedRun


class Text(NamedTuple):
    """Tokens, what to call them, and what tells them from any other text."""

    split: TokenSplit
    label: str
    identity: dict[str, Any]
    corpus: TokenCorpus | None = None
    """What the run was trained on; None for the user's own files."""


def open_corpus(loaded: LoadedRun) -> TokenCorpus:
    """The corpus a run was trained on; refuses another text or tokenizer."""
    environment = loaded.run.environment()
    if "corpus_folder" not in environment:
        raise DataError(f"{loaded.run.path} was imported without its corpus; name a --text")
    folder = Path(environment["corpus_folder"])
    corpus = TokenCorpus(folder) if folder.is_dir() else prepare(loaded.recipe.data)
    corpus.require_tokenizer(environment["tokenizer_sha256"], str(loaded.run.path))
    corpus.require_fingerprint(environment["corpus_fingerprint"], str(loaded.run.path))
    return corpus


@contextmanager
def open_text(
    loaded: LoadedRun, split: str = "valid", files: Path | None = None, max_tokens: int = 0
) -> Iterator[Text]:
    """A split of the run's corpus, or a file or folder instead, of which no more is tokenized than
    `max_tokens` ask for (0: all). Raises `DataError`."""
    if files is None:
        corpus = open_corpus(loaded)
        own = {"fingerprint": corpus.fingerprint, "split": split}
        yield Text(corpus.split(split), f"{split} split", own, corpus)
        return
    stats = {str(path.absolute()): path.stat() for path in list_files((files,))}
    identity = {"files": {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}}
    vocab_size = loaded.recipe.data.tokenizer.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        tokens = split_from_files(files, loaded.tokenizer, vocab_size, Path(folder), max_tokens)
        yield Text(tokens, files.name, identity)
