"""Hashes of files, and where the user's cache is."""

import hashlib
import os
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def user_cache(name: str) -> Path:
    """The folder for things of that name that can be made again."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sra_ds" / name
