"""Bytes that real processes hand to collectives in a step, beside planning/communication.py.

    PYTHONPATH=tests python -m planning.collectives     writes docs/results/scaling/communication.json

The model is that of tests/distributed.py: buckets and groups are cut to its size, so that it meets what a
large one does.
"""

import json
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from commands import ROOT
from distributed import config_of, cut, open_engine, recipe_of, run_ranks
from sra_ds.config import Recipe
from sra_ds.data.loader import random_batch
from sra_ds.planning.case import Case
from sra_ds.planning.shapes import Layout, read_shapes
from sra_ds.planning.zero import read_zero
from sra_ds.selftest.collectives import CollectiveCounter, Sent, planned_bytes, together
from sra_ds.training.ds_config import plan_batches
from sra_ds.training.step import step_loss

OUT = ROOT / "docs" / "results" / "scaling" / "communication.json"
STEADY = 3
"""Steps before the one that is counted: ZeRO-3 follows its recorded trace from the third on."""


class Setting(NamedTuple):
    """A training step to be counted; `zero` overrides the shipped JSON's ZeRO options."""

    ep: int
    stage: int
    overlay: dict[str, Any] | None = None
    zero: dict[str, Any] | None = None

    def recipe(self) -> Recipe:
        """The small recipe with its overlay."""
        return recipe_of(self.ep, self.overlay)

    def config(self) -> dict[str, Any]:
        """The configuration of the stage."""
        config = config_of(self.stage)
        config["zero_optimization"] |= self.zero or {}
        return config

    def case(self, world: int) -> Case:
        """What planning takes."""
        recipe = self.recipe()
        batches = plan_batches(recipe, world)
        marked = getattr(recipe.model.channel, "backend", "local") == "deepspeed"
        return Case(
            recipe, read_shapes(recipe), Layout(world, self.ep, marked), read_zero(self.config()),
            batches.micro_batch_size, batches.accumulation,
            2 if recipe.training.precision == "bf16" else 4, "cpu",
        )  # fmt: skip


ACCUMULATED = {"training": {"micro_batch_size": 1}}
RECOMPUTED = {"training": {"activation_checkpointing": True}}
CLIPPED = {"training": {"gradient_clipping": 1.0}}
BF16 = {"training": {"precision": "bf16"}}
LOCAL = {"model": {"channel": {"backend": "local"}}}
DENSE = {
    "model": {"channel": {"kind": "dense", "feed_forward": {"hidden": 48, "dropout": 0.0}}},
    "losses": {"balance": "none", "dispersion": "none", "z_weight": 0.0},
}
TO_OWNERS = {"use_multi_rank_bucket_allreduce": False}
FORGET = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
SMALL_STAY = {"stage3_param_persistence_threshold": 300}
KEPT = {"stage3_prefetch_bucket_size": 10**6, **SMALL_STAY}


def window(reuse: int) -> dict[str, int]:
    """Parameters are kept over so many elements, and none is fetched ahead."""
    return {"stage3_max_reuse_distance": reuse, "stage3_prefetch_bucket_size": 0}


TWO = {
    **{f"ep{ep}-zero{s}": Setting(ep, s) for ep in (1, 2) for s in range(4)},
    **{f"accumulated-ep{e}-zero{s}": Setting(e, s, ACCUMULATED) for e in (1, 2) for s in range(4)},
    **{f"owners-ep{ep}-zero{s}": Setting(ep, s, zero=TO_OWNERS) for ep in (1, 2) for s in (1, 2)},
    **{f"recomputed-zero{s}": Setting(2, s, RECOMPUTED) for s in (1, 3)},
    **{f"clipped-ep{ep}-zero{s}": Setting(ep, s, CLIPPED) for ep, s in ((1, 0), (2, 1), (2, 3))},
    **{f"bf16-zero{s}": Setting(2, s, BF16) for s in (1, 2, 3)},
    **{f"local-zero{s}": Setting(1, s, LOCAL) for s in (0, 2, 3)},
    **{f"dense-zero{s}": Setting(1, s, DENSE) for s in (0, 1, 3)},
    **{f"forget-ep{ep}-zero3": Setting(ep, 3, zero=FORGET) for ep in (1, 2)},
    **{f"window{n}-zero3": Setting(1, 3, zero=window(n)) for n in (1, 9_000, 14_000, 25_000)},
    "small-stay-zero3": Setting(1, 3, ACCUMULATED, {**FORGET, **SMALL_STAY}),
    "kept-zero3": Setting(2, 3, ACCUMULATED, KEPT),
}
FOUR = {
    **{f"ep{ep}-zero{s}": Setting(ep, s) for ep in (1, 2, 4) for s in range(4)},
    **{f"owners-ep{ep}-zero1": Setting(ep, 1, zero=TO_OWNERS) for ep in (1, 2)},
    "accumulated-zero2": Setting(2, 2, ACCUMULATED),
    "forget-zero3": Setting(2, 3, zero=FORGET),
}
SETTINGS = {2: TWO, 4: FOUR}


def count_steps(world: int) -> dict[str, Sent]:
    """In a process of `run_ranks`: what it handed over in one steady step of every setting."""
    found = {}
    for name, setting in SETTINGS[world].items():
        recipe, engine = setting.recipe(), open_engine(setting.recipe(), setting.config())
        for number in range(STEADY):
            one_step(engine, recipe, number)
        with CollectiveCounter() as counter:
            one_step(engine, recipe, STEADY)
        found[name] = dict(counter.bytes)
        engine.destroy()
    return found


def one_step(engine: Any, recipe: Recipe, number: int) -> None:
    """Forward, backward and update on random tokens."""
    batches = plan_batches(recipe, dist.get_world_size())
    windows = random_batch(recipe, batches.batch_size, number)
    for micro in range(batches.accumulation):
        output = engine(*cut(windows, batches.rank_slice(micro, dist.get_rank())))
        engine.backward(step_loss(output, recipe.losses).total)
        engine.step()


def main() -> None:
    """Count everything and write it down."""
    rows = []
    for world, settings in SETTINGS.items():
        ranks = run_ranks(world, count_steps, world)
        for name, setting in settings.items():
            counted, expected = (
                together([rank[name] for rank in ranks]),
                planned_bytes(setting.case(world)),
            )
            rows.append({
                "processes": world, **setting._asdict(), "name": name,
                "counted": {" ".join(key): size for key, size in sorted(counted.items())},
                "predicted": {" ".join(key): size for key, size in sorted(expected.items())},
            })  # fmt: skip
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
