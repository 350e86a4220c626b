"""The embedded corpus: English that every installation already has.

Docstrings of the standard library and of the installed scientific packages, read from their source
with `ast` (nothing is imported), plus the language reference in `pydoc_data.topics`. A document is a
module's docstrings in order; modules are split by a hash of their name; an exact repetition is kept
once, and no word 13-gram of one split occurs in another. The text depends on the installed versions,
so the corpus carries them.
"""

import ast
import importlib.metadata
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from pathlib import Path
from platform import python_version
from typing import NamedTuple

from tqdm import tqdm

from sra_ds.config.data import DocstringsConfig
from sra_ds.data.documents import SPLITS, Document, drop_shared, ngram_set, split_by_hash
from sra_ds.errors import DataError

HELD_OUT = 0.03
MIN_WORDS = 8
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "site-packages",
    "__pycache__",
    "idlelib",
    "lib2to3",
    "_internal",
}
DOC_CALLS = {"add_docstr", "add_newdoc", "add_docstr_all"}


class Module(NamedTuple):
    """One source module: dotted name, package it belongs to, docstrings in order."""

    name: str
    domain: str
    pieces: list[str]


class DocstringSource:
    """Reads all modules once; splits are cut from memory (about 15 MB of text)."""

    def __init__(self, config: DocstringsConfig, progress: bool = True) -> None:
        self.config = config
        self.progress = progress

    def identity(self) -> dict[str, object]:
        """Python's version and that of each package; raises `DataError` for one not installed."""
        versions: dict[str, object] = {"python": python_version()}
        for package in self.config.packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                raise DataError(
                    f"data.packages: {package} is not installed; install it or remove it from the list"
                ) from None
        return versions

    def documents(self, split: str) -> Iterator[Document]:
        """Documents of one split, in the order of module names."""
        for name, domain, pieces in self._modules_by_split[split]:
            del name
            text = "\n\n".join(pieces)
            yield Document(text, domain, len(text.split()))

    @cached_property
    def _modules_by_split(self) -> dict[str, list[Module]]:
        modules: dict[str, list[Module]] = {split: [] for split in SPLITS}
        for module in _without_repetitions(self._read_modules()):
            modules[split_by_hash(module.name, HELD_OUT)].append(module)
        forbidden: set[tuple[str, ...]] = set()
        for split in reversed(SPLITS):
            cleaned = [m._replace(pieces=drop_shared(m.pieces, forbidden)) for m in modules[split]]
            modules[split] = [module for module in cleaned if module.pieces]
            forbidden |= ngram_set("\n\n".join(module.pieces) for module in modules[split])
        return modules

    def _read_modules(self) -> list[Module]:
        files = [
            (path, name, "python")
            for path, name in _source_files(Path(sysconfig.get_path("stdlib")), "")
        ]
        for package in self.config.packages:
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                raise DataError(f"data.packages: {package} has no readable source folder")
            folder = Path(spec.submodule_search_locations[0])
            files += [(path, name, package) for path, name in _source_files(folder, package)]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(_read_module, files, chunksize=64)
            modules = list(tqdm(found, "reading docstrings", len(files), disable=not self.progress))
        return (
            sorted((m for m in modules if m.pieces), key=lambda m: m.name) + _language_reference()
        )


def _source_files(folder: Path, prefix: str) -> list[tuple[Path, str]]:
    files = []
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if not SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            files.append((path, ".".join(filter(None, [prefix, *relative.with_suffix("").parts]))))
    return files


def _read_module(file: tuple[Path, str, str]) -> Module:
    path, name, domain = file
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return Module(name, domain, [])  # templates and broken links in foreign packages
    pieces = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            pieces.append(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Call) and _called_name(node) in DOC_CALLS:
            pieces += [_literal(argument) for argument in node.args]
    return Module(name, domain, [p for p in map(_cleaned, pieces) if len(p.split()) >= MIN_WORDS])


def _called_name(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def _literal(node: ast.expr) -> str:
    """The text of a string literal, also of one that is formatted with `.format(...)` or `%`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _literal(node.func.value)
    if isinstance(node, ast.BinOp):
        return _literal(node.left)
    return ""


def _cleaned(text: str) -> str:
    return text.strip().encode("utf-8", "ignore").decode("utf-8")


def _language_reference() -> list[Module]:
    from pydoc_data.topics import topics  # 1 MB of text, needed only when this corpus is made

    return [
        Module(f"pydoc_data.topics.{name}", "python", [topics[name].strip()])
        for name in sorted(topics)
    ]


def _without_repetitions(modules: list[Module]) -> list[Module]:
    seen: set[str] = set()
    unique = []
    for module in modules:
        pieces = [piece for piece in dict.fromkeys(module.pieces) if piece not in seen]
        seen.update(pieces)
        if pieces:
            unique.append(module._replace(pieces=pieces))
    return unique
