"""The corpora: one class per `data.source`, and the table that chooses among them."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sra_ds.config.data import (
    CorpusConfig,
    DocstringsConfig,
    HubConfig,
    TextConfig,
    WikitextConfig,
)
from sra_ds.data.docstrings import DocstringSource
from sra_ds.data.documents import Document, Source, split_by_hash
from sra_ds.data.files import list_files, naming, open_text, read_documents
from sra_ds.errors import DataError

ARTICLE_TITLE = re.compile(r"^ = [^=].* = $")
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


class TextSource:
    """The user's own files."""

    def __init__(self, config: TextConfig, progress: bool = True) -> None:
        del progress
        self.config = config

    def identity(self) -> dict[str, object]:
        """Name, size and time of every file."""
        named = self.config.train + self.config.valid + self.config.test
        stats = {str(path): path.stat() for path in list_files(named)}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def documents(self, split: str) -> Iterator[Document]:
        """Documents of the files named for the split, or those its hash share takes of `train`."""
        config = self.config
        named = {"train": config.train, "valid": config.valid, "test": config.test}
        lacking = {name for name in ("valid", "test") if not named[name]}
        own = "train" if split in lacking else split
        for path in list_files(named[own]):
            for document in read_documents(path, config.field):
                if own != "train" or split == held_out_split(document.text, config, lacking):
                    yield document


class WikitextSource:
    """WikiText articles with every line, heading and line end; words are counted the papers' way:
    blanks-separated words plus one end-of-line mark a line."""

    def __init__(self, config: WikitextConfig, progress: bool = True) -> None:
        del progress
        self.config = config

    def identity(self) -> dict[str, object]:
        """The hub name, or name, size and time of the files."""
        if self.config.path is None:
            return {"hub": self._hub_name()}
        files = [self._file(self.config.path, split) for split in HUB_SPLITS]
        return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}

    def documents(self, split: str) -> Iterator[Document]:
        """One document per article."""
        if self.config.path is None:
            rows = load_from_hub("Salesforce/wikitext", self._hub_name(), HUB_SPLITS[split])
            yield from articles(f"{row['text'].rstrip(chr(10))}\n" for row in rows)
            return
        path = self._file(self.config.path, split)
        with naming(path), open_text(path) as lines:
            yield from articles(lines)

    def _hub_name(self) -> str:
        return f"{self.config.source}-raw-v1" if self.config.raw else f"{self.config.source}-v1"

    @staticmethod
    def _file(folder: Path, split: str) -> Path:
        names = [f"wiki.{split}.{kind}{end}" for kind in ("raw", "tokens") for end in ("", ".xz")]
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise DataError(f"data.path={folder}: none of {', '.join(names)} is there")


class HubSource:
    """A text data set of the Hugging Face hub."""

    def __init__(self, config: HubConfig, progress: bool = True) -> None:
        del progress
        self.config = config

    def identity(self) -> dict[str, object]:
        """Name and subset of the data set."""
        return {"dataset": self.config.dataset, "subset": self.config.subset}

    def documents(self, split: str) -> Iterator[Document]:
        """Rows of the split, or the hash share of the training rows if the data set lacks it."""
        config = self.config
        available = hub_splits(config.dataset, config.subset)
        lacking = {ours for ours, theirs in HUB_SPLITS.items() if theirs not in available}
        own = HUB_SPLITS["train" if split in lacking else split]
        for row in load_from_hub(config.dataset, config.subset, own):
            text = row.get(config.field)
            if not isinstance(text, str):
                raise DataError(
                    f"{config.dataset}: rows have no text in {config.field!r}; set data.field"
                )
            if own == "train" and split != held_out_split(text, config, lacking):
                continue
            if text.strip():
                yield Document(text, config.dataset, len(text.split()))


SOURCES: dict[type[CorpusConfig], type[Any]] = {
    DocstringsConfig: DocstringSource,
    TextConfig: TextSource,
    WikitextConfig: WikitextSource,
    HubConfig: HubSource,
}


def open_source(config: CorpusConfig, progress: bool = True) -> Source:
    """The corpus a recipe names."""
    source: Source = SOURCES[type(config)](config, progress)
    return source


def held_out_split(text: str, config: TextConfig | HubConfig, lacking: set[str]) -> str:
    """Split of a training document: the hash share goes to the splits that have no text of their own."""
    share = split_by_hash(text, config.held_out)
    return share if share in lacking else "train"


def articles(lines: Iterable[str]) -> Iterator[Document]:
    """Cut WikiText lines into articles at their ` = Title = ` lines, which follow a blank line (some
    equations look like titles); nothing is dropped."""
    article: list[str] = []
    for line in lines:
        after_blank = not article or not article[-1].strip()
        if after_blank and ARTICLE_TITLE.match(line.rstrip("\n")) and "".join(article).strip():
            yield _article(article)
            article = []
        article.append(line)
    if article:
        yield _article(article)


def _article(lines: list[str]) -> Document:
    text = "".join(lines)
    return Document(text, "wikipedia", len(text.split()) + len(lines))


def load_from_hub(name: str, subset: str | None, split: str) -> Iterable[dict[str, Any]]:
    """Rows of a hub data set, from its offline cache where there is one."""
    import datasets  # slow to import, needed for hub sources only

    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(_unreachable(name, error)) from None
    return rows


def hub_splits(name: str, subset: str | None) -> list[str]:
    """Names of the splits a hub data set has."""
    import datasets

    try:
        return list(datasets.get_dataset_split_names(name, subset))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(_unreachable(name, error)) from None


def _unreachable(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return (
        f"data set {name!r} is neither in the offline cache nor reachable ({reason}); "
        "use data.source=text, or data.path for WikiText files on disk"
    )
