"""Batches of documents by token budget, from the recipe to the losses of a step."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from saved_runs import corpus
from sra_ds.config.loading import merge, validate
from sra_ds.errors import ConfigError
from sra_ds.model.language_model import build_model
from sra_ds.training.ds_config import plan_batches
from sra_ds.training.feed import WindowFeed, build_feed
from sra_ds.training.step import step_loss

__all__ = ["corpus"]

DOCUMENTS = {"batching": "documents", "batch_size": 12, "micro_batch_size": 3}


def recipe_with(corpus: Any, **training: Any) -> Any:
    channel = {"kind": "dense", "feed_forward": {"hidden": 16, "dropout": 0.0}}
    tree = {
        "name": "tiny",
        "data": corpus[0].model_dump(mode="json"),
        "model": {
            "width": 16,
            "layers": 1,
            "embedding": {"dropout": 0.0},
            "mixer": {"heads": 2, "dropout": 0.0},
            "channel": channel,
        },
        "training": {"steps": 4, "batch_size": 12},
    }
    return validate(merge(tree, {"training": training}))


def test_documents_fill_the_budget_of_a_micro_batch(corpus) -> None:
    recipe = recipe_with(corpus, **DOCUMENTS)
    plan = plan_batches(recipe, 2)
    assert (plan.accumulation, plan.world_size) == (2, 2)
    feeds = [build_feed(recipe, corpus[1], plan, rank) for rank in range(2)]
    for step in range(6):
        batches = [feed.batch(step, micro) for micro in range(2) for feed in feeds]
        assert all(batch.ids_BT.numel() <= 3 * 16 for batch in batches)
        counted = sum(int((batch.targets_BT != -100).sum()) for batch in batches)
        assert counted == feeds[0].targets(step) == feeds[1].targets(step)


def test_a_step_does_not_depend_on_the_processes(corpus) -> None:
    recipe = recipe_with(corpus, **DOCUMENTS)
    seen = []
    for world in (1, 2, 4):
        plan = plan_batches(recipe, world)
        feeds = [build_feed(recipe, corpus[1], plan, rank) for rank in range(world)]
        batches = [feed.batch(3, m) for m in range(plan.accumulation) for feed in feeds]
        seen.append(batches)
    for batches in seen[1:]:
        for mine, theirs in zip(batches, seen[0], strict=True):
            assert torch.equal(mine.ids_BT, theirs.ids_BT)


def test_an_epoch_has_every_token_once(corpus) -> None:
    recipe = recipe_with(corpus, **{**DOCUMENTS, "batch_size": 3})
    feed = build_feed(recipe, corpus[1], plan_batches(recipe, 1), 0)
    split = corpus[1].split("train")
    tokens = np.concatenate(
        [
            batch.targets_BT[batch.targets_BT != -100].numpy()
            for batch in (feed.batch(step, 0) for step in range(feed.documents.count))
        ]
    )
    assert feed.epoch(feed.documents.count) == 1
    expected = split.read(1, split.tokens)
    assert np.array_equal(np.sort(tokens), np.sort(expected))


@pytest.mark.parametrize("batching", ["windows", "documents"])
def test_the_loss_of_a_step_is_the_mean_over_its_tokens(corpus, batching: str) -> None:
    recipe = recipe_with(corpus, **{**DOCUMENTS, "batching": batching})
    plan = plan_batches(recipe, 1)
    feed, model = build_feed(recipe, corpus[1], plan, 0), build_model(recipe).double()
    step = 0
    while (
        batching == "documents"
        and len({feed.documents.targets(4 * step + n) for n in range(4)}) == 1
    ):
        step += 1
    batches = [feed.batch(step, micro) for micro in range(plan.accumulation)]
    sizes = {int((batch.targets_BT != -100).sum()) for batch in batches}
    assert (len(sizes) > 1) == (batching == "documents")
    targets = feed.targets(step) / plan.accumulation
    outputs = [model(*batch) for batch in batches]
    loss = sum(step_loss(o, recipe.losses, targets).cross_entropy for o in outputs)
    whole = sum(o.loss_sum for o in outputs) / sum(o.token_count for o in outputs)
    torch.testing.assert_close(loss / plan.accumulation, whole)


def test_documents_need_a_budget(corpus) -> None:
    with pytest.raises(ConfigError, match="batching=documents needs micro_batch_size"):
        recipe_with(corpus, batching="documents")


def test_windows_count_their_tokens() -> None:
    windows = SimpleNamespace(length=7, count=30)
    feed = WindowFeed(windows, SimpleNamespace(batch_size=6), 0)  # type: ignore[arg-type]
    assert feed.targets(5) == 42 and feed.epoch(10) == 2
