"""Peak memory of training steps in fresh processes, beside planning/memory.py.

    python tests/planning/peak_memory.py          measures GRID, writes docs/results/scaling/memory.json

What is measured is resident memory above what a process has after a step of a tiny model (libraries, code
compiled on first use), over three steps: the first makes the optimizer's states, and ZeRO-3 follows its
recorded trace from the third on. Every block of 64 KiB or more is given back to the system when it is
freed, so that the peak is what the step needs and not what the C library keeps;
`heap.keep_freed_memory`, which a run uses for speed, makes it keep all of it (`as_run` below).
"""

import ctypes
import gc
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from commands import ROOT
from distributed import cut, open_engine, run_ranks
from sra_ds.config import Recipe, load_recipe
from sra_ds.data.loader import random_batch
from sra_ds.heap import M_MMAP_MAX, M_TRIM_THRESHOLD
from sra_ds.ops.extension import extension
from sra_ds.planning.case import Case
from sra_ds.planning.memory import Memory, estimate
from sra_ds.planning.shapes import Layout, read_shapes
from sra_ds.planning.zero import read_zero
from sra_ds.training.ds_config import plan_batches, read_ds_config
from sra_ds.training.step import step_loss

OUT = ROOT / "docs" / "results" / "scaling" / "memory.json"
TINY = ["model.width=32", "model.layers=1", "model.channel.experts=4", "training.batch_size=4"]
TINY += ["model.channel.expert.hidden=16", "data.tokenizer.vocab_size=512"]
SWIGLU = ("model.channel.expert.kind=swiglu", "model.channel.expert.hidden=256")
CODE_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1", "LRU_CACHE_CAPACITY": "1"}
"""oneDNN keeps compiled code for every shape it meets, hundreds of MB with experts in bf16."""
M_MMAP_THRESHOLD, BLOCK, STEPS = -3, 64 * 1024, 3
RESET_PEAK = "5"


class Setting(NamedTuple):
    """Training to be measured: a recipe, the ZeRO stage, windows per process and step, processes; and
    elements of the gradient bucket where not those of the shipped configuration."""

    recipe: str
    stage: int
    windows: int
    overrides: tuple[str, ...] = ()
    world: int = 1
    ep: int = 1
    bucket: int = 0

    def load(self) -> Recipe:
        """The recipe with everything set."""
        own = [f"training.batch_size={self.windows * self.world}", "training.micro_batch_size=0"]
        return load_recipe(self.recipe, ["training.precision=fp32", *own, *self._layout()])

    def tiny(self) -> Recipe:
        """A small recipe that runs the same code."""
        precision = [o for o in self.overrides if o.startswith("training.precision=")]
        layout = [
            o for o in self._layout() if o.split("=")[0] in ("parallel.expert_parallel_size",)
        ]
        layout += ["model.channel.backend=deepspeed"] if self.ep > 1 else []
        return load_recipe("quickstart", ["training.precision=fp32", *TINY, *precision, *layout])

    def _layout(self) -> list[str]:
        spread = [f"parallel.expert_parallel_size={self.ep}", "model.channel.backend=deepspeed"]
        return [*self.overrides, *(spread if self.ep > 1 else [])]

    def config(self) -> dict[str, Any]:
        """The shipped configuration of the stage."""
        config = read_ds_config(ROOT / "ds_configs" / f"zero{self.stage}.json")
        if self.bucket:
            config["zero_optimization"]["reduce_bucket_size"] = self.bucket
        return config

    def estimate(self) -> Memory:
        """What planning says of one process."""
        recipe = self.load()
        batches = plan_batches(recipe, self.world)
        width = 2 if recipe.training.precision == "bf16" else 4
        layout = Layout(self.world, self.ep, marked=self.ep > 1)
        windows, accumulation = batches.micro_batch_size, batches.accumulation
        zero = read_zero(self.config())
        compiled = "cpu" in extension().devices
        case = Case(
            recipe, read_shapes(recipe), layout, zero, windows, accumulation, width, "cpu", compiled
        )
        return estimate(case)


CHARACTERS = {
    "experts": ("sra-small", 16, ()),
    "dense": ("dense-small", 16, ()),
    "swiglu with dropout": ("quickstart", 16, (*SWIGLU, "model.channel.expert.dropout=0.1")),
}
GRID = [
    *(Setting(name, s, n, extra) for name, n, extra in CHARACTERS.values() for s in range(4)),
    *(Setting("sra-small", s, 1) for s in range(4)),
    *(Setting("sra-small", s, 4, ("training.micro_batch_size=2",)) for s in range(4)),
    *(Setting("sra-small", s, 16, ("training.activation_checkpointing=true",)) for s in (0, 2)),
    *(Setting("sra-small", s, 2, ("training.precision=bf16",)) for s in (1, 2, 3)),
    *(Setting("sra-small", s, 4, (), 2, ep) for ep in (1, 2) for s in (1, 2, 3)),
    *(Setting("sra-small", s, 4, (), 2, 1, 2_000_000) for s in (1, 2, 3)),
]


def peak_bytes(setting: Setting, as_run: bool = False) -> int:
    """In a process of `run_ranks`: bytes above the baseline; `as_run` keeps freed memory."""
    os.environ |= CODE_CACHES
    if not as_run:
        return_freed_memory()
    train(setting, setting.tiny(), 1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = resident("VmRSS")
    train(setting, setting.load(), STEPS)
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Bytes of resident memory now (VmRSS) or at most (VmHWM). A process inherits the `ru_maxrss` of the
    one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`: blocks of 64 KiB and more live in mappings of their own."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 2**20)
    libc.mallopt(M_MMAP_THRESHOLD, BLOCK)
    libc.mallopt(M_TRIM_THRESHOLD, BLOCK)


def train(setting: Setting, recipe: Recipe, steps: int) -> None:
    """Optimizer steps on random tokens."""
    engine = open_engine(recipe, setting.config(), prepare=lambda model: None)
    batches, rank = plan_batches(recipe, setting.world), engine.global_rank
    for number in range(steps):
        windows = random_batch(recipe, batches.batch_size, number)
        for micro in range(batches.accumulation):
            output = engine(*cut(windows, batches.rank_slice(micro, rank)))
            engine.backward(step_loss(output, recipe.losses).total)
            engine.step()


def measure(setting: Setting, as_run: bool = False) -> int:
    """The largest peak of the setting's processes."""
    return max(run_ranks(setting.world, peak_bytes, setting, as_run))


def main() -> None:
    """Measure the grid and write it down."""
    rows = []
    for setting in GRID:
        found, expected = measure(setting), setting.estimate()
        row = {**setting._asdict(), "measured": found, "estimated": expected.peak}
        row |= {"error": expected.peak / found - 1, "moments": expected.moments}
        if (setting.recipe, setting.windows, setting.world) == ("sra-small", 16, 1):
            row["as_run"] = measure(setting, as_run=True)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    facts = {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu"}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({**facts, "steps": STEPS, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
