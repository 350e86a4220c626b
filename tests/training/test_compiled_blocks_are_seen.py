"""Hooks that are set once blocks are compiled and have run see what passes all the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sra_ds.config import Recipe
from sra_ds.data.loader import Batch, random_batch
from sra_ds.model.language_model import build_model
from sra_ds.training.anchors import router_inputs
from sra_ds.training.controllers.specialisation import all_outputs
from sra_ds.training.health import NOT_FORWARD, first_non_finite

Builder = Callable[..., Recipe]


class Engine(torch.nn.Module):
    """As DeepSpeed wraps a model."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


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


def test_the_part_that_is_not_finite(tiny_recipe: Builder) -> None:
    torch.compiler.reset()
    model = build_model(tiny_recipe())
    batch = random_batch(tiny_recipe(), 2, 0)
    for block in model.blocks:
        block.compile(backend="eager")
    engine = Engine(model)
    assert first_non_finite(engine, batch) == NOT_FORWARD
    engine(*batch)
    model.blocks[1].mixer.out.weight.data[0, 0] = torch.nan
    assert first_non_finite(engine, batch) == "layer 1 mixer"
    assert not any(module._forward_hooks for module in model.modules())
