"""WikiText: the papers' word counts, whole articles, nothing lost; and the hub when it is away."""

import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from sra_ds.config.data import HubConfig, TokenizerConfig, WikitextConfig
from sra_ds.data.prepare import prepare
from sra_ds.data.sources import HubSource, WikitextSource, articles
from sra_ds.errors import DataError

WORDS = {"valid": 217_646, "test": 245_569}
LINES = [
    " \n",
    " = First = \n",
    " \n",
    " Text of the first , with = signs = inside . \n",
    " = = Section = = \n",
    " = = = Deeper = = = \n",
    " = 1 rad / s = \n",
    " \n",
    " = Second ( 2nd ) = \n",
    " \n",
    " More text .\n",
]


@pytest.fixture(params=["wikitext-2", "wikitext-103"])
def source(request: pytest.FixtureRequest, shared) -> WikitextSource:
    """A real WikiText folder."""
    return WikitextSource(WikitextConfig(source=request.param, path=shared(request.param)))


@pytest.mark.parametrize("split", WORDS)
def test_words_are_the_papers(source, split):
    assert sum(document.words for document in source.documents(split)) == WORDS[split]


@pytest.mark.parametrize("split", WORDS)
def test_articles_joined_are_the_file(source, split):
    file = source.config.path / f"wiki.{split}.tokens.xz"
    with lzma.open(file, "rt", encoding="utf-8", newline="\n") as stream:
        whole = stream.read()
    assert "".join(document.text for document in source.documents(split)) == whole


def test_there_are_sixty_articles_in_each(source):
    for split in WORDS:
        documents = list(source.documents(split))
        assert len(documents) == 60
        assert all(re.match(r"(\s*\n)? = [^=].* = \n", d.text) for d in documents)


def test_wikitext_103_without_train_is_refused(shared):
    folder = shared("wikitext-103")
    source = WikitextSource(WikitextConfig(source="wikitext-103", path=folder))
    with pytest.raises(DataError, match=re.escape(f"data.path={folder}: none of wiki.train.raw")):
        source.identity()


def test_prepared_words_are_the_papers(tmp_path, shared):
    for split in WORDS:
        target = tmp_path / f"wiki.{split}.tokens.xz"
        target.symlink_to(shared("wikitext-2") / target.name)
    (tmp_path / "wiki.train.tokens").write_text("".join(LINES) * 50, encoding="utf-8")
    config = WikitextConfig(
        source="wikitext-2",
        path=tmp_path,
        directory=tmp_path / "corpora",
        tokenizer=TokenizerConfig(vocab_size=300),
    )
    corpus = prepare(config, progress=False)
    for split, words in WORDS.items():
        assert corpus.split(split).words == words
    assert corpus.domains == ["wikipedia"]


def test_articles_begin_at_titles_alone():
    found = list(articles(LINES))
    assert [d.text for d in found] == ["".join(LINES[:8]), "".join(LINES[8:])]
    assert [d.words for d in found] == [len("".join(LINES[:8]).split()) + 8, 12]


def test_an_equation_cut_into_lines_is_no_title():
    equation = [" a cut off of ωc \n", " = 1 rad / s and k = \n", " 1 Ω . \n"]
    (whole,) = articles([" = Filter = \n", " \n", *equation])
    assert whole.text.endswith("".join(equation))


def test_no_lines_give_no_articles():
    assert list(articles([])) == []


def write_folder(folder: Path, content: bytes, ending: str = ".raw.xz") -> WikitextConfig:
    for split in ("train", "valid", "test"):
        (folder / f"wiki.{split}{ending}").write_bytes(content)
    return WikitextConfig(source="wikitext-2", path=folder)


@pytest.mark.parametrize("ending", [".raw", ".raw.xz", ".tokens", ".tokens.xz"])
def test_any_original_file_name_is_found(tmp_path, ending):
    content = "".join(LINES).encode()
    packed = lzma.compress(content) if ending.endswith(".xz") else content
    source = WikitextSource(write_folder(tmp_path, packed, ending))
    assert "".join(d.text for d in source.documents("valid")).encode() == content
    assert set(source.identity()) == {
        f"wiki.{split}{ending}" for split in ("train", "valid", "test")
    }


def test_folder_without_files_is_named(tmp_path):
    source = WikitextSource(WikitextConfig(source="wikitext-103", path=tmp_path))
    with pytest.raises(DataError) as caught:
        source.identity()
    assert str(caught.value) == (
        f"data.path={tmp_path}: none of wiki.train.raw, wiki.train.raw.xz, wiki.train.tokens, "
        "wiki.train.tokens.xz is there"
    )


@pytest.mark.parametrize(
    ("content", "ending"),
    [
        (b"caf\xe9\n", ".raw"),
        (lzma.compress(b"line\n" * 1000)[:-20], ".raw.xz"),
        (b"never compressed", ".raw.xz"),
    ],
    ids=["not utf-8", "truncated", "not xz"],
)
def test_unreadable_file_is_named(tmp_path, content, ending):
    source = WikitextSource(write_folder(tmp_path, content, ending))
    with pytest.raises(DataError, match=re.escape(str(tmp_path / f"wiki.train{ending}"))):
        list(source.documents("train"))


OFFLINE = """
from sra_ds.config.data import HubConfig, WikitextConfig
from sra_ds.data.prepare import prepare
from sra_ds.errors import DataError
for config in (
    HubConfig(dataset="nobody/nothing", directory="{folder}"),
    WikitextConfig(source="wikitext-2", directory="{folder}"),
):
    try:
        prepare(config, progress=False)
    except DataError as error:
        print(error)
"""


def test_hub_that_cannot_be_reached_gives_one_line_each(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE.format(folder=tmp_path)],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=True,
    )
    hub, wikitext = result.stdout.splitlines()
    reason = "is neither in the offline cache nor reachable ("
    assert hub.startswith(f"data set 'nobody/nothing' {reason}")
    assert wikitext.startswith(f"data set 'Salesforce/wikitext' {reason}")
    assert wikitext.endswith("use data.source=text, or data.path for WikiText files on disk")


ROWS = [f"row number {n}" for n in range(200)]


class TestHubSplits:
    """Which rows a hub data set gives to train, valid and test, with the hub replaced by a dict."""

    @pytest.fixture
    def serve(self, monkeypatch: pytest.MonkeyPatch):
        """Pretend that the hub has these splits."""

        def pretend(splits: dict[str, list[dict[str, object]]]) -> HubSource:
            monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: list(splits))
            monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: splits[split])
            return HubSource(HubConfig(dataset="a/b", held_out=0.2))

        return pretend

    @staticmethod
    def rows(texts: list[str]) -> list[dict[str, object]]:
        return [{"text": text} for text in texts]

    def read(self, source: HubSource) -> dict[str, list[str]]:
        return {
            split: [document.text for document in source.documents(split)]
            for split in ("train", "valid", "test")
        }

    def test_its_own_splits_are_taken_whole(self, serve):
        parts = {
            "train": ROWS[:100],
            "validation": ROWS[100:150],
            "test": ROWS[150:],
        }
        found = self.read(serve({name: self.rows(texts) for name, texts in parts.items()}))
        assert list(found.values()) == list(parts.values())

    def test_lacking_splits_are_cut_from_train_by_hash(self, serve):
        found = self.read(serve({"train": self.rows(ROWS)}))
        assert sorted(found["train"] + found["valid"] + found["test"]) == sorted(ROWS)
        assert all(found.values())

    def test_only_the_lacking_split_is_cut_from_train(self, serve):
        parts = {"train": self.rows(ROWS[:150]), "validation": self.rows(ROWS[150:])}
        found = self.read(serve(parts))
        assert found["valid"] == ROWS[150:]
        assert sorted(found["train"] + found["test"]) == sorted(ROWS[:150])

    def test_rows_without_text_are_refused(self, serve):
        source = serve({"train": [{"body": "x"}]})
        with pytest.raises(DataError) as caught:
            list(source.documents("train"))
        assert str(caught.value) == "a/b: rows have no text in 'text'; set data.field"
