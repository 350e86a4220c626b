"""A corpus that is not what its manifest says is refused, with the file's name and what to do."""

import json
from pathlib import Path

import numpy as np
import pytest

from sra_ds.data.prepare import prepare
from sra_ds.data.shards import SCHEMA_VERSION, TokenCorpus
from sra_ds.errors import DataError

FILES = ["train-00000.bin", "valid-00000.bin", "test-00000.bin", "train.documents.npy"]


def error_of(folder: Path) -> str:
    """The one-line error that opening the corpus gives."""
    with pytest.raises(DataError) as caught:
        TokenCorpus(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("name", [*FILES, "tokenizer.json"])
def test_missing_file_is_named(corpus, name):
    (corpus.folder / name).unlink()
    assert error_of(corpus.folder).startswith(
        f"{corpus.folder / name} is missing; delete the folder"
    )


@pytest.mark.parametrize("name", [*FILES, "tokenizer.json"])
def test_flipped_byte_is_found(corpus, name):
    path = corpus.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert error_of(corpus.folder).startswith(f"{path} is damaged")


@pytest.mark.parametrize("name", [*FILES, "tokenizer.json"])
def test_of_several_that_share_the_files_one_finds_it(corpus, name):
    path = corpus.folder / name
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    found = []
    for which in range(3):
        try:
            TokenCorpus(corpus.folder, (which, 3))
        except DataError as error:
            found.append(str(error))
    assert len(found) == 1 and found[0].startswith(f"{path} is damaged")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-2, 2])
def test_wrong_size_is_found(corpus, name, change):
    path = corpus.folder / name
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    assert str(path) in error_of(corpus.folder)


def test_truncated_shard_names_both_sizes(corpus):
    path = corpus.folder / "train-00000.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:100])
    assert f"has 100 bytes instead of {size}" in error_of(corpus.folder)


def test_damage_is_found_when_the_corpus_is_asked_for_again(config, corpus):
    (corpus.folder / "train-00000.bin").unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin is missing"):
        prepare(config, progress=False)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"schema_version": 1, ', b"\xff\xfe", b"[]", b"null", b'{"schema_version": 1}'],
)
def test_damaged_manifest_is_named(corpus, content):
    (corpus.folder / "manifest.json").write_bytes(content)
    assert str(corpus.folder / "manifest.json") in error_of(corpus.folder)


def test_missing_manifest_is_named(corpus):
    (corpus.folder / "manifest.json").unlink()
    assert "manifest.json: no readable manifest" in error_of(corpus.folder)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, None, "1"])
def test_other_schema_version_is_refused(corpus, version):
    path = corpus.folder / "manifest.json"
    path.write_text(json.dumps({**corpus.manifest, "schema_version": version}))
    message = error_of(corpus.folder)
    assert message.startswith(f"{path}: schema version {version}, this program reads")


def test_other_tokenizer_is_refused(corpus):
    corpus.require_tokenizer(corpus.manifest["tokenizer"]["sha256"], "runs/a")
    with pytest.raises(DataError) as caught:
        corpus.require_tokenizer("0" * 64, "runs/a")
    assert str(caught.value).startswith(
        f"{corpus.folder} was made with another tokenizer than runs/a"
    )


def test_other_text_is_refused(corpus):
    corpus.require_fingerprint(corpus.fingerprint, "runs/a")
    with pytest.raises(DataError) as caught:
        corpus.require_fingerprint("0" * 64, "runs/a")
    assert str(corpus.folder) in str(caught.value)
    assert "is not the corpus of runs/a (000000000000)" in str(caught.value)


@pytest.mark.parametrize("name", ["dev", "test"])
def test_split_without_text_is_named(corpus, name):
    corpus.manifest["splits"]["test"]["tokens"] = 0
    with pytest.raises(DataError) as caught:
        corpus.split(name)
    assert str(caught.value) == f"{corpus.folder}: the corpus has no {name} split"


def test_shards_are_read_without_being_loaded(corpus):
    assert all(isinstance(shard, np.memmap) for shard in corpus.split("train")._maps)
