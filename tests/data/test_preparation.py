"""A prepared corpus counts what it holds, is made once, and is either complete or absent."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from sra_ds.config.data import TextConfig, TokenizerConfig
from sra_ds.data import prepare as preparation
from sra_ds.data import shards
from sra_ds.data.prepare import corpus_folder, prepare
from sra_ds.data.shards import TokenCorpus
from sra_ds.data.tokenizer import END_OF_TEXT
from sra_ds.errors import DataError

SPLITS = ("train", "valid", "test")
HOLD_AND_PREPARE = """
import sys
from sra_ds.config.data import TextConfig
from sra_ds.data.prepare import prepare
config = TextConfig.model_validate_json(sys.argv[1])
print("ready", flush=True)
print(prepare(config, progress=False).fingerprint, flush=True)
"""


def documents_of(corpus: TokenCorpus, split: str) -> list[str]:
    """The texts of a split, decoded from its tokens; each document is opened by the mark."""
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    tokens = corpus.split(split)
    starts = [*tokens.documents["start"].tolist(), tokens.tokens]
    texts = []
    for start, stop in itertools.pairwise(starts):
        ids = tokens.read(start, stop).tolist()
        assert ids[0] == corpus.end_of_text_id
        texts.append(tokenizer.decode(ids[1:], skip_special_tokens=False))
    return texts


def test_every_document_comes_back_from_one_split(corpus, texts):
    found = {split: documents_of(corpus, split) for split in SPLITS}
    assert sorted(found["train"] + found["valid"] + found["test"]) == sorted(texts)
    assert all(found.values())


@pytest.mark.parametrize("split", SPLITS)
def test_manifest_counts_equal_a_recount(corpus, split):
    texts, entry = documents_of(corpus, split), corpus.manifest["splits"][split]
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    assert entry["documents"]["count"] == len(texts)
    assert entry["tokens"] == sum(len(tokenizer.encode(text).ids) + 1 for text in texts)
    assert entry["words"] == sum(len(text.split()) for text in texts)
    assert entry["bytes"] == sum(len(text.encode()) for text in texts)
    table = corpus.split(split).documents
    assert table["words"].tolist() == [len(text.split()) for text in texts]
    assert table["bytes"].tolist() == [len(text.encode()) for text in texts]


def test_documents_keep_their_domain(corpus):
    for split in SPLITS:
        table = corpus.split(split).documents
        for text, number in zip(documents_of(corpus, split), table["domain"], strict=True):
            parity = int(text.split()[1].rstrip(".")) % 2
            assert corpus.domains[number] == ["even", "odd"][parity]


def test_the_mark_inside_a_text_does_not_open_a_document(tmp_path):
    text = f"before {END_OF_TEXT} after\n"
    (tmp_path / "a.txt").write_text(text)
    config = TextConfig(
        train=(tmp_path / "a.txt",), valid=(tmp_path / "a.txt",), directory=tmp_path
    )
    corpus = prepare(config, progress=False)
    split = corpus.split("train")
    assert documents_of(corpus, "train") == [text]
    assert (split.read(0, split.tokens) == corpus.end_of_text_id).sum() == 1


def test_equal_input_gives_an_equal_fingerprint(config, tmp_path):
    first = prepare(config, progress=False)
    second = prepare(config.model_copy(update={"directory": tmp_path / "other"}), progress=False)
    assert first.folder != second.folder
    assert first.fingerprint == second.fingerprint


def test_other_text_gives_another_fingerprint(config, texts, tmp_path):
    path = tmp_path / "changed.jsonl"
    changed = [*texts[:-1], texts[-1].upper()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in changed))
    other = prepare(config.model_copy(update={"train": (path,)}), progress=False)
    assert other.fingerprint != prepare(config, progress=False).fingerprint


def test_shards_do_not_change_what_is_read(config, monkeypatch):
    whole = prepare(config, progress=False)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 100)
    cut = prepare(config.model_copy(update={"directory": config.directory / "cut"}), progress=False)
    assert len(cut.manifest["splits"]["train"]["shards"]) > 3
    for split in SPLITS:
        assert documents_of(cut, split) == documents_of(whole, split)


def test_batches_of_documents_do_not_change_what_is_written(config, monkeypatch):
    whole = prepare(config, progress=False)
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 1)
    one_by_one = config.model_copy(update={"directory": config.directory / "single"})
    assert prepare(one_by_one, progress=False).fingerprint == whole.fingerprint


def test_large_vocabulary_is_stored_in_32_bits(config):
    wide = config.model_copy(update={"tokenizer": TokenizerConfig(vocab_size=2**16 + 1)})
    corpus = prepare(wide, progress=False)
    assert corpus.manifest["dtype"] == "uint32"
    assert len(documents_of(corpus, "train")) > 0


def test_second_call_builds_nothing(config, monkeypatch):
    first = prepare(config, progress=False)
    monkeypatch.setattr(preparation, "_build", lambda *_: pytest.fail("built again"))
    assert prepare(config, progress=False).manifest == first.manifest
    assert corpus_folder(config) == first.folder


def test_window_length_does_not_decide_the_corpus(config):
    longer = config.model_copy(update={"sequence_length": 64})
    assert corpus_folder(longer) == corpus_folder(config)


def test_changed_file_is_another_corpus(config, tmp_path, texts):
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "one"}\n')
    own = config.model_copy(update={"train": (path,)})
    before = corpus_folder(own)
    path.write_text('{"text": "one more"}\n')
    assert corpus_folder(own) != before


def test_given_tokenizer_is_used_and_decides_the_folder(config, corpus, tmp_path):
    given = config.model_copy(
        update={"tokenizer": TokenizerConfig(vocab_size=300, file=corpus.tokenizer_file)}
    )
    again = prepare(given, progress=False)
    assert again.folder != corpus.folder
    assert again.fingerprint == corpus.fingerprint
    again.require_tokenizer(corpus.manifest["tokenizer"]["sha256"], "the first run")
    missing = config.model_copy(update={"tokenizer": TokenizerConfig(file=tmp_path / "no.json")})
    with pytest.raises(DataError, match=r"no\.json does not exist"):
        prepare(missing, progress=False)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file_is_named(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        prepare(TextConfig(train=(path,), directory=tmp_path / "corpora"), progress=False)
    assert "empty.txt" in str(caught.value)


def test_text_too_small_to_split_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a few words\n")
    with pytest.raises(DataError, match=r"split of .* has no text"):
        prepare(TextConfig(train=(path,), directory=tmp_path / "corpora"), progress=False)


def test_broken_input_leaves_no_corpus(config, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n{\n')
    broken = config.model_copy(update={"valid": (path,), "test": (path,)})
    with pytest.raises(DataError, match=r"broken\.jsonl: line 2 is not JSON"):
        prepare(broken, progress=False)
    assert not corpus_folder(broken).exists()


def test_failure_at_the_last_moment_leaves_no_corpus(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _refuse)
        with pytest.raises(OSError, match="pulled the plug"):
            prepare(config, progress=False)
    assert not corpus_folder(config).exists()
    assert prepare(config, progress=False).split("train").tokens > 0
    assert not corpus_folder(config).with_name(corpus_folder(config).name + ".partial").exists()


def _refuse(*_: object) -> None:
    raise OSError("pulled the plug")


def start(config: TextConfig) -> subprocess.Popen[str]:
    """A process that prepares the corpus, stopped until its first line is read."""
    command = [sys.executable, "-c", HOLD_AND_PREPARE, config.model_dump_json()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def slow_config(tmp_path: Path, texts: list[str]) -> TextConfig:
    """A corpus that takes about a second to prepare."""
    path = tmp_path / "larger.jsonl"
    lines = (json.dumps({"text": f"{n} {text}"}) for n in range(200) for text in texts)
    path.write_text("\n".join(lines), encoding="utf-8")
    return TextConfig(
        train=(path,),
        held_out=0.2,
        tokenizer=TokenizerConfig(vocab_size=400),
        directory=tmp_path / "corpora",
    )


def test_killed_preparation_leaves_nothing_that_looks_complete(slow_config):
    rng, folder = random.Random(0), corpus_folder(slow_config)
    for _ in range(4):
        process = start(slow_config)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if folder.exists():
            TokenCorpus(folder)
    corpus = prepare(slow_config, progress=False)
    assert sum(corpus.manifest["splits"][split]["documents"]["count"] for split in SPLITS) == 12_000


def test_concurrent_preparations_share_one_result(slow_config):
    processes = [start(slow_config) for _ in range(2)]
    fingerprints = {process.communicate(timeout=120)[0].split()[-1] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert fingerprints == {prepare(slow_config, progress=False).fingerprint}
    folders = [path for path in slow_config.directory.iterdir() if path.is_dir()]
    assert folders == [corpus_folder(slow_config)]


def test_waiting_process_does_not_build_again(config, monkeypatch, tmp_path):
    built = tmp_path / "built"
    build = preparation._build

    def counted(*arguments: object) -> None:
        with built.open("a") as stream:
            stream.write("x")
        build(*arguments)

    monkeypatch.setattr(preparation, "_build", counted)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare, args=(config, False)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert built.read_text() == "x"
