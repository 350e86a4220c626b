"""The ranges of all processes of an expert parallelism make up the whole model, once each."""

import math
from collections.abc import Callable

import pytest
import torch

from families import CLOSED
from sra_ds.config import Recipe
from sra_ds.model.language_model import build_model
from sra_ds.moe.placement import Placement
from sra_ds.storage.held import held_ranges

Builder = Callable[..., Recipe]


def test_one_process_holds_everything(tiny_recipe: Builder, family: str) -> None:
    model = build_model(tiny_recipe(family), "meta")
    ranges = held_ranges(model)
    assert list(ranges) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert ranges[name].whole and ranges[name].shape == tuple(tensor.shape), name


@pytest.mark.parametrize("closed_family", CLOSED)
@pytest.mark.parametrize("size", [2, 4])
def test_experts_are_split_along_their_first_dimension(
    tiny_recipe: Builder, closed_family: str, size: int
) -> None:
    recipe = tiny_recipe(closed_family)
    shapes = {n: tuple(t.shape) for n, t in build_model(recipe, "meta").state_dict().items()}
    by_rank = []
    for rank in range(size):
        model = build_model(recipe, "meta", Placement("deepspeed", size, rank))
        by_rank.append(held_ranges(model))
        for name, tensor in model.state_dict().items():
            assert by_rank[-1][name].stop - by_rank[-1][name].start == tensor.numel(), name
    for name, shape in shapes.items():
        parts = [ranges[name] for ranges in by_rank]
        assert {part.shape for part in parts} == {shape}, name
        if ".backend.experts." in name:
            covered = torch.cat([torch.arange(part.start, part.stop) for part in parts])
            assert torch.equal(covered, torch.arange(math.prod(shape))), name
            assert [part.parts for part in parts] == [size] * size
        else:
            assert all(part.whole for part in parts), name


def test_a_range_is_the_rows_of_the_experts_held(tiny_recipe: Builder) -> None:
    """What rank 1 holds of 4 experts at 2 processes is what the whole model has in rows 2 and 3."""
    recipe = tiny_recipe("moe-swiglu-shared")
    whole = build_model(recipe)
    model = build_model(recipe, placement=Placement("deepspeed", 2, 1))
    ranges, weights = held_ranges(model), whole.state_dict()
    for name, tensor in model.state_dict().items():
        values = weights[name].reshape(-1)[ranges[name].start : ranges[name].stop]
        assert torch.equal(values, tensor.reshape(-1)), name
