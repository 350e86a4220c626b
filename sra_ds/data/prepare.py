"""corpus -> tokenizer -> token shards, once per corpus and tokenizer.

The text is streamed: memory holds a batch of documents and the BPE counts, not the corpus. The result
is built in a `.partial` folder and renamed when its manifest is complete, under a file lock that the
system releases when the process dies, so concurrent runs share one preparation and a killed one leaves
nothing that looks complete.
"""

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from sra_ds.config.data import CorpusConfig
from sra_ds.data.documents import SPLITS, Document, Source
from sra_ds.data.files import list_files, read_documents
from sra_ds.data.shards import SCHEMA_VERSION, ShardWriter, TokenCorpus, TokenSplit, fingerprint
from sra_ds.data.sources import open_source
from sra_ds.data.tokenizer import (
    end_of_text_id,
    limit_bytes,
    load_tokenizer,
    train_tokenizer,
)
from sra_ds.errors import DataError
from sra_ds.files import file_sha256

BATCH_CHARACTERS = 2_000_000
LAST_DOMAIN = 2**16 - 1


def corpus_folder(config: CorpusConfig) -> Path:
    """Where the prepared corpus of this configuration is or will be."""
    return _folder(config, open_source(config, progress=False).identity())


def prepare(
    config: CorpusConfig, progress: bool = True, share: tuple[int, int] = (0, 1)
) -> TokenCorpus:
    """Open the prepared corpus, making it first if needed; `share` as of `TokenCorpus`.

    Raises `DataError` naming the file for damaged shards or unreadable input.
    """
    source = open_source(config, progress)
    identity = source.identity()
    folder = _folder(config, identity)
    if folder.is_dir():  # also where it cannot be written to
        return TokenCorpus(folder, share)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder.with_name(folder.name + ".lock")):
        if not folder.exists():
            _build(config, source, identity, folder, progress)
    return TokenCorpus(folder, share)


def _folder(config: CorpusConfig, identity: dict[str, object]) -> Path:
    recipe = config.model_dump(mode="json", exclude={"directory", "sequence_length"})
    if config.tokenizer.file is not None and config.tokenizer.file.is_file():
        recipe["tokenizer"]["file"] = file_sha256(config.tokenizer.file)
    text = json.dumps([SCHEMA_VERSION, recipe, identity], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    return config.directory / f"{recipe['source']}-v{config.tokenizer.vocab_size}-{key}"


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(
                f"waiting for another process that prepares {path.with_suffix('')}", file=sys.stderr
            )
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _build(
    config: CorpusConfig, source: Source, identity: dict[str, object], folder: Path, progress: bool
) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tokenizer = _tokenizer(config, source, progress)
    tokenizer.save(str(partial / "tokenizer.json"))
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "identity": identity,
        "recipe": config.model_dump(mode="json", exclude={"directory", "sequence_length"}),
        "tokenizer": {
            "sha256": file_sha256(partial / "tokenizer.json"),
            "entries": tokenizer.get_vocab_size(),
            "end_of_text_id": end_of_text_id(tokenizer),
        },
        "dtype": token_dtype(config.tokenizer.vocab_size),
    }
    domains: dict[str, int] = {}
    manifest["splits"] = {
        split: _write_split(source, split, tokenizer, manifest["dtype"], domains, partial, progress)
        for split in SPLITS
    }
    manifest["domains"] = list(domains)
    manifest["fingerprint"] = fingerprint(manifest)
    for split in ("train", "valid"):
        if not manifest["splits"][split]["tokens"]:
            raise DataError(
                f"the {split} split of {folder.name} has no text; give it more or name files"
            )
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
    _sync(partial)
    os.replace(partial, folder)


def _tokenizer(config: CorpusConfig, source: Source, progress: bool) -> Tokenizer:
    wanted = config.tokenizer
    if wanted.file is not None:
        return load_tokenizer(wanted.file, wanted.vocab_size)
    texts = (document.text for document in source.documents("train"))
    bar = tqdm(texts, "learning the tokenizer", unit=" documents", disable=not progress)
    return train_tokenizer(limit_bytes(bar, wanted.train_bytes), wanted.vocab_size)


def _write_split(
    source: Source,
    split: str,
    tokenizer: Tokenizer,
    dtype: str,
    domains: dict[str, int],
    folder: Path,
    progress: bool,
) -> dict[str, Any]:
    writer = ShardWriter(folder, split, dtype, end_of_text_id(tokenizer))
    with tqdm(desc=f"tokenizing {split}", unit="B", unit_scale=True, disable=not progress) as bar:
        for batch in _batches(source.documents(split)):
            bar.update(_write_batch(writer, batch, tokenizer, domains))
    return writer.close()


def _write_batch(
    writer: ShardWriter, batch: list[Document], tokenizer: Tokenizer, domains: dict[str, int]
) -> int:
    """Tokenize documents and append them, numbering new domain labels; their UTF-8 bytes."""
    written = 0
    encodings = tokenizer.encode_batch_fast([document.text for document in batch])
    for document, encoding in zip(batch, encodings, strict=True):
        domain = domains.setdefault(document.domain, len(domains))
        if domain > LAST_DOMAIN:
            raise DataError(f"more than {LAST_DOMAIN + 1} domain labels in the corpus")
        size = len(document.text.encode())
        writer.add(encoding.ids, document.words, size, domain)
        written += size
    return written


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in itertools.chain(documents, [None]):
        if document is not None:
            batch.append(document)
            size += len(document.text)
        if batch and (document is None or size >= BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def split_from_files(
    path: Path, tokenizer: Tokenizer, vocab_size: int, folder: Path, max_tokens: int = 0
) -> TokenSplit:
    """Tokenize a text file or folder into `folder` as a split of its own, for scoring; with `max_tokens`
    documents after the one that reaches it are not read."""
    dtype = token_dtype(vocab_size)
    writer = ShardWriter(folder, "text", dtype, end_of_text_id(tokenizer))
    domains: dict[str, int] = {}
    documents = (d for file in list_files((path,)) for d in read_documents(file, "text"))
    for batch in _batches(documents):
        _write_batch(writer, batch, tokenizer, domains)
        if max_tokens and writer.tokens >= max_tokens:
            break
    entry = writer.close()
    if entry["tokens"] < 2:
        raise DataError(f"{path} has no text to score")
    return TokenSplit(folder, entry, dtype, list(domains))


def token_dtype(vocab_size: int) -> str:
    """The smallest unsigned type that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"
