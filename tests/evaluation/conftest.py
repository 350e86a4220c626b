"""A ragged split of random tokens, a tiny routed model and models whose loss is known."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from saved_runs import call, corpus, make_run
from sra_ds.config.loading import validate
from sra_ds.data.shards import ShardWriter, TokenSplit
from sra_ds.model.language_model import LanguageModel, ModelOutput, build_model

__all__ = ["call", "corpus", "make_run"]

VOCABULARY = 300
LENGTHS = [9, 1, 40, 0, 17, 63, 3, 22]
MOE = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "gelu", "hidden": 16}}


def write_split(
    folder: Path, documents: list[list[int]], words: list[int] | None = None
) -> TokenSplit:
    """Documents of token ids, opened by token 0; unless given, 2 words a token; 3 bytes a token."""
    writer = ShardWriter(folder, "valid", "uint16", 0)
    for number, ids in enumerate(documents):
        own = 2 * len(ids) if words is None else words[number]
        writer.add(ids, words=own, size=3 * len(ids), domain=0)
    return TokenSplit(folder, writer.close(), "uint16")


@pytest.fixture
def make_split(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenSplit]:
    """Token ids per document -> a split."""

    def make(documents: list[list[int]], words: list[int] | None = None) -> TokenSplit:
        return write_split(tmp_path_factory.mktemp("split"), documents, words)

    return make


@pytest.fixture
def split(make_split: Callable[..., TokenSplit]) -> TokenSplit:
    """163 tokens in eight documents of very different lengths, one of them empty."""
    rng = np.random.default_rng(0)
    return make_split([rng.integers(1, VOCABULARY, n).tolist() for n in LENGTHS])


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    """Two routed blocks of width 16, with weights large enough for losses far from uniform."""
    recipe = validate(
        {
            "name": "tiny",
            "data": {"source": "docstrings", "tokenizer": {"vocab_size": VOCABULARY}},
            "model": {"width": 16, "layers": 2, "mixer": {"heads": 2}, "channel": MOE},
            "training": {"steps": 1, "batch_size": 1},
        }
    )
    built = build_model(recipe).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(15)
    return built


def stub(
    nll_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[..., ModelOutput]:
    """A model whose loss of each target is `nll_of(ids, targets)`; it is right on even targets."""

    def forward(ids_BT: torch.Tensor, targets_BT: torch.Tensor, *_: object) -> ModelOutput:
        nll_BT = nll_of(ids_BT, targets_BT).double()
        return ModelOutput(
            [], {}, [], [], [], {}, token_nll_BT=nll_BT, correct_BT=targets_BT % 2 == 0
        )

    return forward


@pytest.fixture(scope="session")
def stub_model() -> Callable[..., Callable[..., ModelOutput]]:
    """`stub_model(nll_of)` makes such a model."""
    return stub
