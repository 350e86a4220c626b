"""A tokenizer gives back exactly the text it was given, or is refused with its file's name."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sra_ds.data.tokenizer import (
    END_OF_TEXT,
    end_of_text_id,
    limit_bytes,
    load_tokenizer,
    train_tokenizer,
)
from sra_ds.errors import DataError

LONG = "cafe\u0301 ﬁ word " * 1000


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(["the naïve token routes to an expert " * 20], 320)


@pytest.fixture(scope="module")
def loaded(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return load_tokenizer(path, 320)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_decoding_gives_the_text_back(trained, loaded, text):
    for tokenizer in (trained, loaded):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@given(st.lists(st.sampled_from([END_OF_TEXT, "<|", "endoftext", "|>", " ", "\n"]), max_size=8))
@settings(max_examples=50, deadline=None)
def test_the_mark_inside_a_text_is_text(trained, loaded, pieces):
    text = "".join(pieces)
    for tokenizer in (trained, loaded):
        ids = tokenizer.encode(text).ids
        assert end_of_text_id(tokenizer) not in ids
        assert tokenizer.decode(ids) == text


def test_the_mark_is_the_first_entry(trained):
    assert end_of_text_id(trained) == 0


def test_small_corpus_gives_at_most_the_wanted_entries(trained):
    assert 257 <= trained.get_vocab_size() <= 320
    assert train_tokenizer(["a"], 1000).get_vocab_size() == 257


def test_training_is_deterministic():
    texts = ["one two three", "two three four", "naïve"] * 5
    assert train_tokenizer(texts, 290).to_str() == train_tokenizer(iter(texts), 290).to_str()


def test_limit_stops_at_the_first_text_that_reaches_it():
    assert list(limit_bytes(["ab", "é", "cd", "ef"], 4)) == ["ab", "é"]
    assert list(limit_bytes(["abc"], 1)) == ["abc"]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path / "no.json", 300)
    assert str(caught.value) == f"tokenizer {tmp_path / 'no.json'} does not exist"


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe", b'{"model": 3}'])
def test_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(path, 300)
    assert str(caught.value).startswith(f"tokenizer {path} is not a tokenizer.json (")


def refusal(tokenizer: Tokenizer, path: Path, vocab_size: int = 1000) -> str:
    """The error that loading this tokenizer gives, which names the file."""
    tokenizer.save(str(path))
    with pytest.raises(DataError) as caught:
        load_tokenizer(path, vocab_size)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_tokenizer_without_the_mark_is_refused(tmp_path):
    assert f"has no {END_OF_TEXT} token" in refusal(Tokenizer(models.BPE()), tmp_path / "t.json")


def test_too_large_tokenizer_is_refused(trained, tmp_path):
    size = trained.get_vocab_size()
    message = refusal(trained, tmp_path / "t.json", size - 1)
    assert message.endswith(f"ids up to {size - 1}, data.tokenizer.vocab_size is {size - 1}")


def test_tokenizer_with_an_id_beyond_the_table_is_refused(trained, tmp_path):
    tree = json.loads(trained.to_str())
    last = max(tree["model"]["vocab"], key=tree["model"]["vocab"].get)
    tree["model"]["vocab"][last] = 5000
    refusal(Tokenizer.from_str(json.dumps(tree)), tmp_path / "t.json")


@pytest.mark.parametrize("unknown", [None, "[UNK]"])
def test_word_level_tokenizer_is_refused(tmp_path, unknown):
    entries = {END_OF_TEXT: 0, "[UNK]": 1, "a": 2}
    refusal(Tokenizer(models.WordLevel(entries, unk_token=unknown)), tmp_path / "t.json")


def test_byte_level_without_decoder_is_refused(trained, tmp_path):
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.decoder = decoders.Fuse()
    refusal(tokenizer, tmp_path / "t.json")


def _truncates(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(512)


def _pads(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(length=30_000, pad_id=0, pad_token=END_OF_TEXT)


def _composes(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()


def _adds_a_mark(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )


def _adds_a_blank(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize("change", [_truncates, _pads, _composes, _adds_a_mark, _adds_a_blank])
def test_tokenizer_that_changes_text_or_adds_marks_is_mended_or_refused(trained, tmp_path, change):
    tokenizer = Tokenizer.from_str(trained.to_str())
    change(tokenizer)
    tokenizer.save(str(tmp_path / "t.json"))
    try:
        loaded = load_tokenizer(tmp_path / "t.json", 1000)
    except DataError:
        return
    ids = loaded.encode(LONG).ids
    assert loaded.decode(ids) == LONG
    assert end_of_text_id(loaded) not in ids


def test_gpt2_files_make_a_tokenizer_that_loads(shared, tmp_path):
    folder = shared("gpt2-bpe")
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(tmp_path / "gpt2.json"))
    loaded = load_tokenizer(tmp_path / "gpt2.json", 50_257)
    assert end_of_text_id(loaded) == 50_256
    assert loaded.encode("Hello world").ids == [15496, 995]
    assert loaded.decode(loaded.encode(LONG).ids) == LONG
    refusal(tokenizer, tmp_path / "gpt2.json", 50_256)
