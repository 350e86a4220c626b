"""Saved runs of tiny models, and what most tests of analysis need."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from saved_runs import call, corpus, make_run
from sra_ds.data.tokenizer import end_of_text_id

__all__ = ["call", "corpus", "make_run"]


@pytest.fixture
def trace_of() -> Callable[..., Any]:
    """`trace_of(tokenizer, texts, tokens)`: the part of a trace that words are read from, of no more
    than `tokens` tokens."""

    def make(tokenizer: Tokenizer, texts: list[str], tokens: int = 0) -> Any:
        mark, ids, starts = end_of_text_id(tokenizer), [], []
        for text in texts:
            starts.append(len(ids))
            ids += [mark, *tokenizer.encode(text).ids]
        ids = ids[: tokens or len(ids)]
        kinds = [("start", "i8"), ("domain", "u2")]
        documents = np.array([(s, 0) for s in starts if s < len(ids)], kinds)
        tokens_N = np.array(ids, np.uint16)
        return SimpleNamespace(tokens=len(ids), tokens_N=tokens_N, documents=documents)

    return make
