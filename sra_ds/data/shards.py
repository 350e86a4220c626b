"""A prepared corpus on disk: a folder of memory-mapped token shards that is complete or absent.

    <folder>/manifest.json              written last
             tokenizer.json
             train-00000.bin ...        token ids, uint16 or uint32, one stream per split
             train.documents.npy        per document: first token, words, UTF-8 bytes, domain

Each document is `<|endoftext|>` followed by its tokens, so every token is predicted from its own
document and a document's end is predicted by the next opening mark.
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sra_ds.errors import DataError
from sra_ds.files import file_sha256

SCHEMA_VERSION = 1
SHARD_TOKENS = 2**26
MANIFEST_KEYS = {"schema_version", "tokenizer", "dtype", "splits", "domains", "fingerprint"}
DOCUMENT = np.dtype([("start", "<i8"), ("words", "<i8"), ("bytes", "<i8"), ("domain", "<u2")])


class ShardWriter:
    """Writes one split into a folder, document by document, in shards of `SHARD_TOKENS`."""

    def __init__(self, folder: Path, split: str, dtype: str, end_of_text_id: int) -> None:
        self.folder, self.split, self.dtype, self.end_of_text_id = (
            folder,
            split,
            dtype,
            end_of_text_id,
        )
        self.shards: list[dict[str, Any]] = []
        self.documents = {name: array("q") for name in DOCUMENT.names or ()}
        self.tokens = 0
        self._pending = array({"uint16": "H", "uint32": "I"}[dtype])

    def add(self, ids: list[int], words: int, size: int, domain: int) -> None:
        """Append one document: its token ids, reference words, UTF-8 bytes and domain number."""
        for column, value in zip(
            self.documents.values(), (self.tokens, words, size, domain), strict=True
        ):
            column.append(value)
        self._pending.append(self.end_of_text_id)
        self._pending.extend(ids)
        self.tokens += len(ids) + 1
        if len(self._pending) >= SHARD_TOKENS:
            self._flush()

    def close(self) -> dict[str, Any]:
        """Write what is left and return the split's entry of the manifest."""
        if self._pending:
            self._flush()
        table = np.empty(len(self.documents["start"]), dtype=DOCUMENT)
        for name, column in self.documents.items():
            table[name] = np.frombuffer(column, np.int64) if column else 0
        path = self.folder / f"{self.split}.documents.npy"
        np.save(path, table)
        return {
            "shards": self.shards,
            "documents": {"file": path.name, "count": len(table), "sha256": file_sha256(path)},
            "tokens": self.tokens,
            "words": int(table["words"].sum()),
            "bytes": int(table["bytes"].sum()),
        }

    def _flush(self) -> None:
        path = self.folder / f"{self.split}-{len(self.shards):05d}.bin"
        with path.open("wb") as stream:
            self._pending.tofile(stream)
        self.shards.append(
            {"file": path.name, "tokens": len(self._pending), "sha256": file_sha256(path)}
        )
        del self._pending[:]


class TokenSplit:
    """Random access to the token stream of one split without loading it."""

    def __init__(
        self, folder: Path, entry: dict[str, Any], dtype: str, domains: Sequence[str] = ()
    ) -> None:
        self.domains = list(domains)
        """Labels by the number that `documents` has in its column `domain`."""
        self.tokens: int = entry["tokens"]
        self.words: int = entry["words"]
        self.bytes: int = entry["bytes"]
        self._maps = [
            np.memmap(folder / shard["file"], dtype=dtype, mode="r", shape=(shard["tokens"],))
            for shard in entry["shards"]
        ]
        self._starts = np.cumsum([0, *(shard["tokens"] for shard in entry["shards"])])
        self._documents_file = folder / entry["documents"]["file"]

    @cached_property
    def documents(self) -> NDArray[Any]:
        """The document table, dtype `DOCUMENT`."""
        table: NDArray[Any] = np.load(self._documents_file, allow_pickle=False)
        return table

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Token ids [start, stop) of the stream, 0 <= start <= stop <= tokens."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        for number in range(first, len(self._maps)):
            offset = self._starts[number]
            if offset >= stop:
                break
            parts.append(self._maps[number][max(start - offset, 0) : stop - offset])
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


class TokenCorpus:
    """A prepared corpus, opened only after every file matched the manifest's size and hash. With a
    `share` (which, of how many) only every so many-th file is hashed: others see to the rest."""

    def __init__(self, folder: Path, share: tuple[int, int] = (0, 1)) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._verify(*share)

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens and the tokenizer: equal exactly for equal corpora."""
        return str(self.manifest["fingerprint"])

    @property
    def end_of_text_id(self) -> int:
        return int(self.manifest["tokenizer"]["end_of_text_id"])

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def domains(self) -> list[str]:
        return list(self.manifest["domains"])

    def split(self, name: str) -> TokenSplit:
        """One of train, valid, test; raises `DataError` when the corpus has no text for it."""
        entry = self.manifest["splits"].get(name)
        if entry is None or not entry["tokens"]:
            raise DataError(f"{self.folder}: the corpus has no {name} split")
        return TokenSplit(self.folder, entry, self.manifest["dtype"], self.domains)

    def require_tokenizer(self, sha256: str, owner: str) -> None:
        """Raise `DataError` unless the shards were made with the tokenizer of that hash."""
        if self.manifest["tokenizer"]["sha256"] != sha256:
            raise DataError(
                f"{self.folder} was made with another tokenizer than {owner}; "
                "prepare the corpus with that run's tokenizer.json (data.tokenizer.file)"
            )

    def require_fingerprint(self, expected: str, owner: str) -> None:
        """Raise `DataError` unless this is the very text `owner` was trained on."""
        if self.fingerprint != expected:
            raise DataError(
                f"{self.folder} (fingerprint {self.fingerprint[:12]}) is not the corpus of {owner} "
                f"({expected[:12]}): package versions or files changed; start a new run instead"
            )

    def _verify(self, which: int, of: int) -> None:
        width = np.dtype(self.manifest["dtype"]).itemsize
        files = [(self.tokenizer_file, None, self.manifest["tokenizer"]["sha256"])]
        for entry in self.manifest["splits"].values():
            files += [
                (self.folder / shard["file"], shard["tokens"] * width, shard["sha256"])
                for shard in entry["shards"]
            ]
            table = entry["documents"]
            files.append((self.folder / table["file"], None, table["sha256"]))
        for number, (path, size, sha256) in enumerate(files):
            _check_file(path, size, sha256 if number % of == which else None)


def fingerprint(manifest: dict[str, Any]) -> str:
    """Hash over the tokenizer's and every shard's hash, in order."""
    hashes = [manifest["tokenizer"]["sha256"]]
    for split in sorted(manifest["splits"]):
        hashes += [shard["sha256"] for shard in manifest["splits"][split]["shards"]]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus; raises `DataError` if there is none that can be read."""
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{path}: no readable manifest; run tools/prepare_data.py") from None
    if not isinstance(manifest, dict) or not MANIFEST_KEYS.issubset(manifest):
        raise DataError(f"{path}: not a corpus manifest; delete the folder and prepare it again")
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema version {manifest['schema_version']}, this program reads "
            f"{SCHEMA_VERSION}; delete the folder and run tools/prepare_data.py"
        )
    return manifest


def _check_file(path: Path, size: int | None, sha256: str | None) -> None:
    remedy = "delete the folder and run tools/prepare_data.py again"
    if not path.is_file():
        raise DataError(f"{path} is missing; {remedy}")
    if size is not None and path.stat().st_size != size:
        raise DataError(f"{path} has {path.stat().st_size} bytes instead of {size}; {remedy}")
    if sha256 is not None and file_sha256(path) != sha256:
        raise DataError(f"{path} is damaged (its hash differs from the manifest); {remedy}")
