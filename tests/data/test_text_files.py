"""The user's files in every supported form, and one line naming the file for each broken one."""

import gzip
import json
import lzma
import random
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from sra_ds.config.data import TextConfig
from sra_ds.data.files import PLAIN_TEXT_DOCUMENT, list_files, read_documents
from sra_ds.data.sources import TextSource
from sra_ds.errors import DataError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
PACKED = [ending for ending in COMPRESS if ending]


def as_txt(texts: list[str]) -> bytes:
    return "\n\n".join(texts).encode()


def as_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def as_parquet(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink)
    return sink.getvalue().to_pybytes()


FORMS = {".txt": as_txt, ".jsonl": as_jsonl, ".parquet": as_parquet}


def error_of(path: Path, field: str = "text") -> str:
    """The one-line error that reading the file gives; it names the file."""
    with pytest.raises(DataError) as caught:
        list(read_documents(path, field))
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    return message


def incompressible(size: int) -> bytes:
    """ASCII text that stays long when it is compressed."""
    return "".join(random.Random(0).choices("abcdefghijklmnop qrstuvwxyz", k=size)).encode()


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_text(tmp_path, texts, form, ending):
    if form == ".parquet" and ending:
        pytest.skip("parquet compresses inside; wrapped files are refused by name")
    path = tmp_path / f"corpus{form}{ending}"
    path.write_bytes(COMPRESS[ending](FORMS[form](texts)))
    documents = list(read_documents(path, "text"))
    if form == ".txt":
        assert "".join(d.text for d in documents) == "\n\n".join(texts)
    else:
        assert [d.text for d in documents] == texts
    assert sum(d.words for d in documents) == len(" ".join(texts).split())
    assert {d.domain for d in documents} == {"corpus"}


@pytest.mark.parametrize("ending", PACKED)
def test_packed_files_joined_by_cat_are_read_to_the_end(tmp_path, texts, ending):
    path = tmp_path / f"corpus.txt{ending}"
    path.write_bytes(COMPRESS[ending](b"first\n") + COMPRESS[ending](b"second\n"))
    assert "".join(d.text for d in read_documents(path, "text")) == "first\nsecond\n"


def test_plain_text_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    paragraph = "word " * 500 + "\n"
    whole = "\n".join([paragraph] * 60) + "\r\nlast line\r\n"
    (tmp_path / "long.txt").write_text(whole, encoding="utf-8", newline="")
    documents = list(read_documents(tmp_path / "long.txt", "text"))
    assert "".join(d.text for d in documents) == whole
    assert len(documents) > 3
    for document in documents[:-1]:
        assert len(document.text) >= PLAIN_TEXT_DOCUMENT
        assert document.text.endswith("\n\n")


def test_domain_key_labels_a_record(tmp_path):
    lines = [{"text": "one", "domain": "law"}, {"text": "two"}, {"body": "", "text": "  "}]
    (tmp_path / "mixed.part.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    documents = list(read_documents(tmp_path / "mixed.part.jsonl", "text"))
    assert [(d.text, d.domain) for d in documents] == [("one", "law"), ("two", "mixed")]


def test_another_field_may_hold_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "here"}\n')
    assert [d.text for d in read_documents(tmp_path / "a.jsonl", "body")] == ["here"]


def test_folder_is_read_in_name_order_with_subfolders(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.txt", "b/c.jsonl.gz", "a.parquet", "notes.pdf", "b/x.md.xz"):
        (tmp_path / name).touch()
    names = [str(path.relative_to(tmp_path)) for path in list_files((tmp_path,))]
    assert names == ["a.parquet", "b/c.jsonl.gz", "b/x.md.xz", "z.txt"]


def test_given_order_of_paths_is_kept(tmp_path):
    first, second = tmp_path / "z.txt", tmp_path / "a.txt"
    first.write_text("z"), second.write_text("a")
    assert list_files((first, second)) == [first, second]


def test_unknown_ending_is_refused(tmp_path):
    for name in ("paper.pdf", "archive.xz", "nothing"):
        (tmp_path / name).write_text("x")
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / name}: unknown format")):
            list_files((tmp_path / name,))


def test_missing_path_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        list_files((tmp_path / "absent.txt",))
    assert str(caught.value) == f"{tmp_path / 'absent.txt'}: no such file or folder"


def test_folder_without_text_is_named(tmp_path):
    (tmp_path / "picture.png").touch()
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: no readable file")):
        list_files((tmp_path,))


@pytest.mark.parametrize("form", [".txt", ".jsonl"])
def test_file_that_is_not_utf8_is_named(tmp_path, form):
    path = tmp_path / f"latin{form}"
    path.write_bytes(b'{"text": "caf\xe9 au lait"}\n')
    assert "not UTF-8" in error_of(path)


def test_line_that_is_not_json_is_named_by_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": \n')
    assert error_of(path).startswith(f"{path}: line 3 is not JSON")


def test_line_that_is_no_object_is_named_by_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n["text"]\n')
    assert error_of(path) == f"{path}: line 2 is not a JSON object"


@pytest.mark.parametrize("line", ['{"title": "x"}', '{"text": null}', '{"text": 3}'])
def test_record_without_text_is_named_by_number(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    assert error_of(path) == f"{path}: record 2 has no text in 'text'; set data.field"


def test_text_that_no_encoding_can_write_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "half a pair: \\ud83d"}\n')
    error_of(path)


def test_parquet_without_the_column_is_named(tmp_path, texts):
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet(texts))
    assert error_of(path, "body") == f"{path}: record 1 has no text in 'body'; set data.field"


@pytest.mark.parametrize("part", ["half", "none", "page"])
def test_damaged_parquet_is_named(tmp_path, texts, part):
    whole = as_parquet(texts)
    damaged = {
        "half": whole[: len(whole) // 2],
        "none": b"",
        "page": whole[:4] + bytes(byte ^ 255 for byte in whole[4:40]) + whole[40:],
    }
    path = tmp_path / "a.parquet"
    path.write_bytes(damaged[part])
    error_of(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("ending", PACKED)
def test_truncated_file_is_named(tmp_path, ending, share):
    packed = COMPRESS[ending](incompressible(50_000))
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(packed[: int(len(packed) * share)])
    error_of(path)


@pytest.mark.parametrize("ending", PACKED)
def test_file_with_a_wrong_ending_is_named(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(b"plain text, never compressed")
    error_of(path)


@pytest.mark.parametrize("ending", PACKED)
def test_flipped_bytes_never_escape_as_another_error(tmp_path, ending):
    text = incompressible(3_000)
    packed = COMPRESS[ending](text)
    path = tmp_path / f"a.txt{ending}"
    for position in range(0, len(packed), 29):
        path.write_bytes(
            packed[:position] + bytes([packed[position] ^ 255]) + packed[position + 1 :]
        )
        try:
            list(read_documents(path, "text"))
        except DataError as error:
            assert str(path) in str(error)


class TestSplits:
    """Which documents a text source gives to train, valid and test."""

    @staticmethod
    def write(folder: Path, **splits: list[str]) -> dict[str, tuple[Path, ...]]:
        for name, texts in splits.items():
            (folder / f"{name}.jsonl").write_bytes(as_jsonl(texts))
        return {name: (folder / f"{name}.jsonl",) for name in splits}

    @staticmethod
    def read(config: TextConfig) -> dict[str, list[str]]:
        source = TextSource(config)
        return {
            split: [document.text for document in source.documents(split)]
            for split in ("train", "valid", "test")
        }

    def test_hash_cuts_one_set_into_three(self, tmp_path, texts):
        config = TextConfig(**self.write(tmp_path, train=texts), held_out=0.2)
        found = self.read(config)
        assert sorted(found["train"] + found["valid"] + found["test"]) == sorted(texts)
        assert all(found.values())
        assert self.read(config) == found

    def test_hash_depends_on_the_document_alone(self, tmp_path, texts):
        paths = self.write(tmp_path, train=texts, fewer=texts[::-3])
        whole = self.read(TextConfig(train=paths["train"], held_out=0.2))
        fewer = self.read(TextConfig(train=paths["fewer"], held_out=0.2))
        for split in whole:
            assert set(fewer[split]) == set(whole[split]) & set(texts[::-3])

    def test_held_out_is_the_share_of_each_split(self, tmp_path):
        texts = [f"text number {n}" for n in range(4000)]
        found = self.read(TextConfig(**self.write(tmp_path, train=texts), held_out=0.1))
        for split in ("valid", "test"):
            assert 0.08 < len(found[split]) / len(texts) < 0.12

    def test_named_files_are_taken_whole(self, tmp_path, texts):
        paths = self.write(tmp_path, train=texts[:40], valid=texts[40:50], test=texts[50:])
        found = self.read(TextConfig(**paths))
        assert found == {"train": texts[:40], "valid": texts[40:50], "test": texts[50:]}

    def test_without_a_test_file_the_hash_takes_its_share(self, tmp_path, texts):
        paths = self.write(tmp_path, train=texts[:50], valid=texts[50:])
        found = self.read(TextConfig(**paths, held_out=0.2))
        assert found["valid"] == texts[50:]
        assert found["test"]
        assert sorted(found["train"] + found["test"]) == sorted(texts[:50])

    def test_without_a_valid_file_the_hash_takes_its_share(self, tmp_path, texts):
        paths = self.write(tmp_path, train=texts[:50], test=texts[50:])
        found = self.read(TextConfig(**paths, held_out=0.2))
        assert found["test"] == texts[50:]
        assert found["valid"]
        assert sorted(found["train"] + found["valid"]) == sorted(texts[:50])

    def test_identity_changes_with_the_file(self, tmp_path, texts):
        config = TextConfig(**self.write(tmp_path, train=texts))
        before = TextSource(config).identity()
        assert TextSource(config).identity() == before
        self.write(tmp_path, train=texts[:-1])
        assert TextSource(config).identity() != before

    @pytest.mark.parametrize("split", ["train", "valid", "test"])
    def test_missing_file_of_any_split_is_named(self, tmp_path, texts, split):
        paths = self.write(tmp_path, train=texts, valid=texts[:1], test=texts[:1])
        paths[split][0].unlink()
        with pytest.raises(DataError, match=re.escape(str(paths[split][0]))):
            TextSource(TextConfig(**paths)).identity()
