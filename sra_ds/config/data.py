"""Where text comes from and how it becomes token windows."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sra_ds.config.base import Part, by_name


class TokenizerConfig(Part):
    """Byte-level BPE: trained on the training split, or loaded from a file."""

    vocab_size: int = Field(8192, ge=257, le=2**31 - 1)
    """Rows of the embedding; the tokenizer may fill fewer."""
    file: Path | None = None
    """A `tokenizer.json` to load instead of training one; it must hold `<|endoftext|>`."""
    train_bytes: int = Field(100_000_000, gt=0)
    """UTF-8 bytes of the training split the BPE merges are learnt from."""


class CorpusConfig(Part):
    """What every source shares."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: int = Field(256, ge=2)
    """Tokens a model sees at once (T); windows hold T+1 so that each has T targets."""
    directory: Path = Path("data")
    """Folder that keeps prepared corpora, one subfolder per corpus and tokenizer."""


class DocstringsConfig(CorpusConfig):
    """The embedded corpus: docstrings of the installed standard library and scientific packages."""

    source: Literal["docstrings"] = "docstrings"
    packages: tuple[str, ...] = ("torch", "numpy", "sympy", "networkx", "deepspeed")
    """Installed packages read beside the standard library."""


class TextConfig(CorpusConfig):
    """Files or folders of .parquet, or .txt and .jsonl, plain or compressed (.xz, .gz, .zst)."""

    source: Literal["text"] = "text"
    train: tuple[Path, ...]
    """Files or folders of the training split."""
    valid: tuple[Path, ...] = ()
    """Files of the validation split; empty: a hash of each document decides (`held_out`)."""
    test: tuple[Path, ...] = ()
    """Files of the test split; empty: a hash of each training document decides."""
    held_out: float = Field(0.02, gt=0, lt=0.5)
    """Share of documents that goes to each of valid and test when no files are named for it."""
    field: str = "text"
    """Key or column that holds the text in .jsonl and .parquet."""


class WikitextConfig(CorpusConfig):
    """WikiText through `datasets`, or from a folder of the original `wiki.*` files."""

    source: Literal["wikitext-103", "wikitext-2"]
    path: Path | None = None
    """Folder with `wiki.{train,valid,test}.{tokens,raw}[.xz]`; none: the hub or its offline cache."""
    raw: bool = True
    """The `-raw-v1` variant of the hub data set."""


class HubConfig(CorpusConfig):
    """Any text data set of the Hugging Face hub, or of its offline cache."""

    source: Literal["hub"] = "hub"
    dataset: str
    """Name on the hub, such as `roneneldan/TinyStories`."""
    subset: str | None = None
    """Configuration name of the data set."""
    field: str = "text"
    """Column that holds the text."""
    held_out: float = Field(0.02, gt=0, lt=0.5)
    """Share of training documents used as a split the data set lacks."""


DataConfig = Annotated[
    DocstringsConfig | TextConfig | WikitextConfig | HubConfig,
    Field(discriminator="source"),
    by_name("source"),
]
