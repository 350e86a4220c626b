"""The embedded corpus keeps its splits apart: no docstring twice, no 13-gram in two splits."""

import importlib.metadata
import itertools
import sysconfig
from pathlib import Path
from platform import python_version

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sra_ds.config.data import DocstringsConfig
from sra_ds.data import docstrings
from sra_ds.data.docstrings import DocstringSource, Module, _read_module, _without_repetitions
from sra_ds.data.documents import NGRAM, SPLITS, drop_shared, ngram_set, ngrams, split_by_hash
from sra_ds.errors import DataError

LIBRARY = {
    "alpha.py": '"""Reads a table of values from a file and gives back rows one by one."""\n',
    "beta.py": '''
class Beta:
    """Reads a table of values from a file and gives back rows one by one."""
    def run(self):
        """Runs until the caller asks it to stop, then says how often it went around."""
''',
    "test/gamma.py": '"""A test module whose docstring must never be part of the corpus text."""\n',
    "deep/delta.py": """
def f():
    'too short'
add_docstr(f, 'Added from C: {} words that say what f does'.format(9))
""",
    "broken.py": "def (:\n",
}
TEXT = st.lists(st.sampled_from("abc"), max_size=40).map(" ".join)


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of five files, and no language reference."""
    folder = tmp_path / "stdlib"
    for name, text in LIBRARY.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    get_path = sysconfig.get_path

    def path_of(name: str, *rest: object) -> str:
        return str(folder) if name == "stdlib" else get_path(name, *rest)

    monkeypatch.setattr(sysconfig, "get_path", path_of)
    monkeypatch.setattr(docstrings, "_language_reference", list)
    return folder


@pytest.fixture
def networkx(small_library: Path) -> DocstringSource:
    """Docstrings of networkx beside the small library."""
    return DocstringSource(DocstringsConfig(packages=("networkx",)), progress=False)


def test_no_13_gram_is_in_two_splits(networkx):
    grams = {
        split: ngram_set(document.text for document in networkx.documents(split))
        for split in SPLITS
    }
    assert all(grams.values())
    for first, second in itertools.combinations(SPLITS, 2):
        assert not grams[first] & grams[second]


def test_no_docstring_is_kept_twice(networkx):
    pieces = [
        piece
        for modules in networkx._modules_by_split.values()
        for module in modules
        for piece in module.pieces
    ]
    assert len(pieces) > 500
    assert len(pieces) == len(set(pieces))


def test_a_module_stays_in_the_split_of_its_name(networkx):
    for split, modules in networkx._modules_by_split.items():
        assert modules
        assert {split_by_hash(module.name, docstrings.HELD_OUT) for module in modules} == {split}


def test_documents_are_whole_modules_labelled_by_package(networkx):
    documents = list(networkx.documents("train"))
    assert {document.domain for document in documents} <= {"python", "networkx"}
    assert sum(document.words for document in documents) == sum(
        len(document.text.split()) for document in documents
    )
    assert list(networkx.documents("train")) == documents


def test_identity_carries_the_versions(networkx):
    assert networkx.identity() == {
        "python": python_version(),
        "networkx": importlib.metadata.version("networkx"),
    }


def test_unknown_package_is_named():
    source = DocstringSource(DocstringsConfig(packages=("networkx", "nosuchpackage")))
    with pytest.raises(DataError) as caught:
        source.identity()
    assert str(caught.value) == (
        "data.packages: nosuchpackage is not installed; install it or remove it from the list"
    )


@pytest.mark.parametrize("package", ["nosuchpackage", "six"])
def test_package_without_a_source_folder_is_named(small_library, package):
    source = DocstringSource(DocstringsConfig(packages=(package,)), progress=False)
    with pytest.raises(DataError, match=f"{package} has no readable source folder"):
        list(source.documents("train"))


def test_small_library_is_read_without_repetition_tests_or_short_pieces(small_library):
    source = DocstringSource(DocstringsConfig(packages=()), progress=False)
    modules = {m.name: m.pieces for group in source._modules_by_split.values() for m in group}
    assert modules == {
        "alpha": [LIBRARY["alpha.py"].strip().strip('"')],
        "beta": ["Runs until the caller asks it to stop, then says how often it went around."],
        "deep.delta": ["Added from C: {} words that say what f does"],
    }


def test_source_that_does_not_parse_gives_no_pieces(small_library):
    path = small_library / "broken.py"
    assert _read_module((path, "broken", "python")) == Module("broken", "python", [])
    absent = small_library / "absent.py"
    assert _read_module((absent, "absent", "python")).pieces == []


def test_repetitions_go_within_and_across_modules():
    pieces = {"a": ["one", "two", "one"], "b": ["two"], "c": ["three"]}
    modules = [Module(name, "x", own) for name, own in pieces.items()]
    kept = {module.name: module.pieces for module in _without_repetitions(modules)}
    assert kept == {"a": ["one", "two"], "c": ["three"]}


@given(pieces=st.lists(TEXT, max_size=8), other=TEXT)
@settings(max_examples=300, deadline=None)
def test_what_is_left_shares_no_13_gram(pieces, other):
    forbidden = ngram_set([other])
    kept = drop_shared(pieces, forbidden)
    assert not ngram_set(["\n\n".join(kept)]) & forbidden
    rest = iter(pieces)
    assert all(piece in rest for piece in kept)


@given(pieces=st.lists(TEXT, max_size=8))
@settings(max_examples=50, deadline=None)
def test_nothing_forbidden_drops_nothing(pieces):
    assert drop_shared(pieces, set()) == pieces


def test_13_gram_that_arises_by_joining_is_found_too():
    words = [f"w{n}" for n in range(30)]
    first, last = " ".join(words[:6]), " ".join(words[6:13])
    between = " ".join(words[13:28])
    forbidden = {tuple(words[:13]), tuple(words[13:26])}
    assert drop_shared([first, "other", last], forbidden) == [first, "other", last]
    assert drop_shared([first, between, last], forbidden) == []


def test_13_grams_ignore_case_and_punctuation():
    text = "One, two; three - four. five 'six' seven eight nine ten eleven twelve (thirteen)"
    (gram,) = ngrams(text)
    assert gram[0] == "one"
    assert len(gram) == NGRAM
    assert list(ngrams(text.upper().replace(",", "!"))) == [gram]
    assert list(ngrams("only a few words")) == []


@given(st.text(), st.floats(0.001, 0.49))
@settings(max_examples=50, deadline=None)
def test_hash_split_is_fixed_and_grows_with_the_share(key, share):
    split = split_by_hash(key, share)
    assert split == split_by_hash(key, share)
    assert split in SPLITS
    if split == "valid":
        assert split_by_hash(key, 0.495) == "valid"
