"""Reading text files of any supported form as a stream of documents, with errors that name the file."""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from sra_ds.data.documents import Document
from sra_ds.errors import DataError

TEXT_FORMATS = {".txt", ".text", ".md", ".tokens", ".raw", ".jsonl"}
COMPRESSED = {".xz", ".gz", ".zst"}
PLAIN_TEXT_DOCUMENT = 20_000
LONGEST_DOCUMENT = 5 * PLAIN_TEXT_DOCUMENT
READ_BYTES = 2**20


def list_files(paths: tuple[Path, ...]) -> list[Path]:
    """The supported files among `paths` and below the folders in it, sorted within each folder."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.is_file() and _format(f))
            if not found:
                raise DataError(f"{path}: no readable file; supported: {_supported()}")
            files += found
        elif not path.is_file():
            raise DataError(f"{path}: no such file or folder")
        elif not _format(path):
            raise DataError(f"{path}: unknown format; supported: {_supported()}")
        else:
            files.append(path)
    return files


def read_documents(path: Path, field: str) -> Iterator[Document]:
    """Documents of one file.

    A .jsonl line or .parquet row is a document (a `domain` key labels it); other files are plain text,
    cut at the first blank line after 20,000 characters, or the first line end after 100,000. Raises
    `DataError` naming the file for what is not UTF-8, not JSON, truncated or without the field.
    """
    label = path.name.split(".")[0]
    number = 0
    with naming(path):
        for document in _documents(path, field, label):
            number += 1
            yield document
    if not number:
        raise DataError(f"{path} has no text")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Failures of decoding or decompressing become a `DataError` with the file's name."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}); convert it first") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: cannot be read to its end ({error})") from None


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Strict UTF-8 text of a plain or compressed file, line ends kept."""
    opener: Any = OPENERS.get(path.suffix, Path.open)
    with opener(path, "rb") as stream, io.TextIOWrapper(stream, "utf-8", newline="\n") as text:
        yield text


class ZstandardReader(io.RawIOBase):
    """A .zst file as a stream that notices when it ends early; zstandard's own reader does not."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; 0 at the end of the last whole frame."""
        while not self._ready:
            if self._frame.eof:
                rest = self._frame.unused_data or self._file.read(READ_BYTES)
                if not rest:
                    return 0
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            else:
                rest = self._file.read(READ_BYTES)
                if not rest:
                    raise EOFError("the compressed stream is cut off")
            self._ready = self._frame.decompress(rest)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstandard(path: Path, mode: str) -> io.BufferedReader:
    del mode
    return io.BufferedReader(ZstandardReader(path), READ_BYTES)


OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".zst": _open_zstandard}


def _format(path: Path) -> str:
    """The file's format by its name, without compression; empty if it cannot be read."""
    if path.suffix == ".parquet":
        return ".parquet"
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    return suffixes[-1] if suffixes and suffixes[-1] in TEXT_FORMATS else ""


def _supported() -> str:
    text = ", ".join(sorted(TEXT_FORMATS))
    return f"{text}, each also with {', '.join(sorted(COMPRESSED))}, and .parquet"


def _plain_text(path: Path) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    with open_text(path) as stream:
        while line := stream.readline(PLAIN_TEXT_DOCUMENT):
            lines.append(line)
            size += len(line)
            if size >= (LONGEST_DOCUMENT if line.strip() else PLAIN_TEXT_DOCUMENT):
                yield "".join(lines)
                lines, size = [], 0
    rest = "".join(lines)
    if rest.strip():
        yield rest


def _documents(path: Path, field: str, label: str) -> Iterator[Document]:
    if _format(path) == ".parquet":
        return _records(path, _parquet_rows(path), field, label)
    if _format(path) == ".jsonl":
        return _records(path, _json_lines(path), field, label)
    return (Document(text, label, len(text.split())) for text in _plain_text(path))


def _records(
    path: Path, records: Iterator[dict[str, object]], field: str, label: str
) -> Iterator[Document]:
    for number, record in enumerate(records, 1):
        text = record.get(field)
        if not isinstance(text, str):
            raise DataError(f"{path}: record {number} has no text in {field!r}; set data.field")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{path}: record {number} holds half a surrogate pair") from None
        if text.strip():
            yield Document(text, str(record.get("domain") or label), len(text.split()))


def _json_lines(path: Path) -> Iterator[dict[str, object]]:
    with open_text(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}: line {number} is not JSON ({error})") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}: line {number} is not a JSON object")
            yield record


def _parquet_rows(path: Path) -> Iterator[dict[str, object]]:
    import pyarrow
    import pyarrow.parquet as parquet  # slow to import, needed for this format only

    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a readable parquet file ({reason})") from None
