"""Blocks compiled whole, without a graph break, against the same blocks run eagerly."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from references import assert_same, gradients, randomise
from sra_ds.config import Recipe
from sra_ds.model.language_model import LanguageModel, build_model

Builder = Callable[..., Recipe]


def step(
    model: LanguageModel, ids_BT: Tensor, targets_BT: Tensor, doc_BT: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    output = model(ids_BT, targets_BT, doc_BT)
    (output.loss_sum / output.token_count).backward()
    return output.token_nll_BT, gradients(model)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "family", ["moe-cosine", "dense", "moe-hgnn", "moe-block", "spectral-hybrid", "spectral"]
)
def test_compiled_blocks_equal_eager_ones(tiny_recipe: Builder, family: str) -> None:
    torch.compiler.reset()
    model = randomise(build_model(tiny_recipe(family)), 0.1).train()
    compiled = copy.deepcopy(model)
    for block in compiled.blocks:
        block.compile(fullgraph=True)
    ids_BT, targets_BT = torch.randint(257, (2, 2, 16))
    for doc_BT in (None, (torch.arange(16) >= 5).long().expand(2, 16)):
        expected_BT, expected = step(model, ids_BT, targets_BT, doc_BT)
        actual_BT, actual = step(compiled, ids_BT, targets_BT, doc_BT)
        torch.testing.assert_close(actual_BT, expected_BT, rtol=1e-5, atol=1e-5)
        assert_same(actual, expected, 1e-5)
