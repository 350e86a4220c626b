"""Reading text files of any supported form as a stream of documents, with errors that name the file."""

import gzip
import io
import json
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from sra_ds.data.documents import Document
from sra_ds.errors import DataError

OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".zst": zstandard.open}
FORMATS = {".txt", ".text", ".jsonl", ".parquet", ".tokens", ".raw", ".md"}
PLAIN_TEXT_DOCUMENT = 20_000


def list_files(paths: tuple[Path, ...]) -> list[Path]:
    """The supported files among `paths` and below the folders in it, sorted within each folder."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.is_file() and _format(f) in FORMATS)
            if not found:
                raise DataError(f"{path}: no readable file; supported: {_supported()}")
            files += found
        elif path.is_file():
            if _format(path) not in FORMATS:
                raise DataError(f"{path}: unknown format; supported: {_supported()}")
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return files


def read_documents(path: Path, field: str) -> Iterator[Document]:
    """Documents of one file.

    A .jsonl line or .parquet row is a document (a `domain` key labels it); other files are plain text,
    cut at blank lines into documents of at least 20,000 characters. Raises `DataError` naming the file
    for what is not UTF-8, not JSON, truncated or without the field.
    """
    label = path.name.split(".")[0]
    try:
        if _format(path) == ".parquet":
            records: Iterator[dict[str, object]] = _parquet_rows(path)
        elif _format(path) == ".jsonl":
            records = _json_lines(path)
        else:
            for text in _plain_text(path):
                yield Document(text, label, len(text.split()))
            return
        for number, record in enumerate(records, 1):
            content = record.get(field)
            if not isinstance(content, str):
                raise DataError(f"{path}: record {number} has no text in {field!r}; set data.field")
            if content.strip():
                yield Document(content, str(record.get("domain", label)), len(content.split()))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}); convert it first") from None
    except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise DataError(f"{path}: cannot be read to its end ({error})") from None


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Strict UTF-8 text of a plain or compressed file, line ends kept."""
    opener = OPENERS.get(path.suffix, Path.open)
    with opener(path, "rb") as stream, io.TextIOWrapper(stream, "utf-8", newline="\n") as text:
        yield text


def _format(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in OPENERS]
    return suffixes[-1] if suffixes else ""


def _supported() -> str:
    return f"{', '.join(sorted(FORMATS))}, each also with {', '.join(sorted(OPENERS))}"


def _plain_text(path: Path) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    with open_text(path) as stream:
        for line in stream:
            lines.append(line)
            size += len(line)
            if size >= PLAIN_TEXT_DOCUMENT and not line.strip():
                yield "".join(lines)
                lines, size = [], 0
    rest = "".join(lines)
    if rest.strip():
        yield rest


def _json_lines(path: Path) -> Iterator[dict[str, object]]:
    with open_text(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: line {number} is not JSON ({error.msg})") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}: line {number} is not a JSON object")
            yield record


def _parquet_rows(path: Path) -> Iterator[dict[str, object]]:
    import pyarrow
    import pyarrow.parquet as parquet  # slow to import, needed for this format only

    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from None
