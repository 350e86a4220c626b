"""How early routing settles, on choices by hand and on checkpoints that are known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from saved_runs import random_model, save_checkpoint, save_run
from sra_ds.analysis.saturation import choices, overlap, saturation
from sra_ds.analysis.traces import Pass
from sra_ds.config import Recipe
from sra_ds.inference.load import load_run


def test_overlap_is_the_share_of_the_last_choices_made_before() -> None:
    """In any order, layer by layer: (2 + 1 + 0) / (3 x 2), and all."""
    earlier_NLK = np.array([[[0, 1], [4, 2]], [[0, 1], [3, 0]], [[2, 3], [1, 2]]])
    last_NLK = np.array([[[1, 0], [2, 4]], [[1, 2], [3, 0]], [[0, 1], [2, 1]]])
    assert overlap(earlier_NLK, last_NLK).tolist() == [0.5, 1.0]


def test_independent_choices_overlap_by_chance() -> None:
    """K / E."""
    rng = np.random.default_rng(0)
    drawn = [np.argsort(rng.random((4000, 1, 8)), -1)[..., :3] for _ in range(2)]
    assert overlap(*drawn)[0] == pytest.approx(3 / 8, abs=0.01)


def test_checkpoints_are_compared_with_the_last(
    tiny_recipe: Callable[..., Recipe], corpus: Any, tmp_path: Any
) -> None:
    """One that is the last already, one whose second layer alone differs, one of other weights."""
    config, prepared = corpus
    recipe = tiny_recipe(overlay={"data": config.model_dump(mode="json")})
    last, other = random_model(recipe), random_model(recipe)
    run = save_run(tmp_path / "run", recipe, prepared, last)
    save_checkpoint(run, recipe, last, 5)
    save_checkpoint(run, recipe, other, 1)
    with torch.no_grad():
        last.routers()[1].anchors.copy_(other.routers()[1].anchors)
    save_checkpoint(run, recipe, last, 3)
    loaded = load_run(run.path)
    with torch.no_grad():
        loaded.model.final_norm.bias.fill_(3.0)  # of no checkpoint; routers do not see it
    split, how = prepared.split("valid"), Pass(16, 4, prepared.end_of_text_id, 130)
    folders = {step: run.checkpoints / str(step) for step in (7, 1, 3, 5)}
    found = saturation(loaded.model, folders, split, how)
    assert list(found) == [1, 3, 5, 7] and found[5] == found[7] == [1.0, 1.0]
    assert found[3][0] == 1.0 and found[3][1] < 0.9
    assert all(share < 0.9 for share in found[1])
    assert (loaded.model.final_norm.bias == 3.0).all()  # its own weights again
    final_NLK = choices(loaded.model, split, how)
    assert final_NLK.shape == (130, 2, 2)
    loaded.model.load_state_dict(other.state_dict())
    assert found[1] == overlap(choices(loaded.model, split, how), final_NLK).tolist()
    assert saturation(loaded.model, {7: folders[7]}, split, how) == {}
