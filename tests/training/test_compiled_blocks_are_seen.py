"""Hooks that are set once blocks are compiled and have run see what passes all the same."""

from collections.abc import Callable

import pytest
import torch

from sra_ds.config import Recipe
from sra_ds.data.loader import Batch
from sra_ds.model.language_model import build_model
from sra_ds.training.anchors import router_inputs
from sra_ds.training.controllers.specialisation import all_outputs

Builder = Callable[..., Recipe]


@pytest.mark.parametrize("family", ["moe-cosine", "moe-block"])
def test_measurements_after_an_evaluation(tiny_recipe: Builder, family: str) -> None:
    torch.compiler.reset()
    model = build_model(tiny_recipe(family))
    ids_BT = torch.randint(257, (2, 16))
    batch = Batch(ids_BT, ids_BT, torch.zeros_like(ids_BT))
    layers = model.routed_layers()
    model.eval()
    expected = [x_TD.clone() for x_TD in router_inputs(model.routers(), model, batch)]
    outputs = [outputs_END.clone() for outputs_END in all_outputs(model, layers, batch, 20)]
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        for mode in (True, False, True):
            model.train(mode)(*batch)
    assert len(expected) == len(outputs) == 2
    for own, other in zip(router_inputs(model.routers(), model, batch), expected, strict=True):
        torch.testing.assert_close(own, other)
    for own, other in zip(all_outputs(model, layers, batch, 20), outputs, strict=True):
        torch.testing.assert_close(own, other)
