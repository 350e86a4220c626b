"""Texts, token splits without a tokenizer, and a small prepared corpus."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sra_ds.config.data import TextConfig, TokenizerConfig
from sra_ds.data.prepare import prepare
from sra_ds.data.shards import ShardWriter, TokenCorpus, TokenSplit

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
WORDS = ["the", "model", "token", "routes", "expert", "to", "cosine", "naïve", "—", "loss,", "λ"]


def shared_data(*parts: str) -> Path:
    """A folder of the project's shared data; skips the test where it is not mounted."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


def sentence(rng: random.Random, words: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=words))


@pytest.fixture(scope="session")
def shared() -> Callable[..., Path]:
    """`shared("wikitext-2")` is that folder, or the test is skipped with the reason."""
    return shared_data


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sixty short documents, no two equal."""
    rng = random.Random(0)
    return [f"Document {number}.\n{sentence(rng, 5 + number)}\n" for number in range(60)]


@pytest.fixture
def make_split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TokenSplit]]:
    """Token ids per document -> a split on disk; each document is opened by token 0."""

    def make(documents: list[list[int]], dtype: str = "uint16") -> TokenSplit:
        folder = tmp_path_factory.mktemp("split")
        writer = ShardWriter(folder, "train", dtype, 0)
        for ids in documents:
            writer.add(ids, words=len(ids), size=2 * len(ids), domain=0)
        return TokenSplit(folder, writer.close(), dtype)

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """The sixty documents as .jsonl with a domain each."""
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    lines = [
        json.dumps({"text": text, "domain": "even" if number % 2 == 0 else "odd"})
        for number, text in enumerate(texts)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path, text_file: Path) -> TextConfig:
    """A text corpus split by hash, kept in `tmp_path/corpora`."""
    return TextConfig(
        train=(text_file,),
        held_out=0.2,
        tokenizer=TokenizerConfig(vocab_size=300),
        directory=tmp_path / "corpora",
        sequence_length=16,
    )


@pytest.fixture
def corpus(config: TextConfig) -> TokenCorpus:
    """That corpus, prepared."""
    return prepare(config, progress=False)
