"""A small recipe on disk that names every part, and a way to write others beside it."""

from collections.abc import Callable
from pathlib import Path

import pytest

TINY = """\
name: tiny
data: {source: docstrings, sequence_length: 32, tokenizer: {vocab_size: 300}}
model:
  width: 16
  layers: 2
  mixer: {kind: attention, heads: 2}
  channel:
    kind: moe
    experts: 8
    top_k: 2
    expert: {kind: gelu, hidden: 16}
    router: {kind: cosine, temperature: fixed}
losses:
  balance: {kind: switch, weight: 0.01}
training: {steps: 10, batch_size: 4}
"""


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a YAML file of the given name; returns its path as text."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def tiny(write_recipe: Callable[[str, str], str]) -> str:
    """Path of a valid recipe."""
    return write_recipe("tiny.yaml", TINY)
