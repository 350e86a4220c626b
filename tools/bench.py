"""Measure on this machine, as ratios within one run.

step      step time of a recipe over its dense twin, and of the DeepSpeed engine over plain torch
backends  a recipe with every backend installed here, and its dense twin: time, MFU, GPU memory
scaling   throughput of two processes over one, one thread and the same batch each
memory    peak memory of one training step, in plain torch and at ZeRO-2, each in a fresh process
router    the compiled routing operator against the usual chain of torch calls; router-grid: all sizes
experts   the compiled experts against grouped products, a loop, AutoEP and one large product
linear    linear layers and the head's loss, compiled against torch
latency   milliseconds to the first token and the next; mixer, bands, channel: parts against plain ones
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.config import load_recipe
from sra_ds.training.ds_config import read_ds_config
from sra_ds.training.environment import prepare_process

RECIPES = dict.fromkeys(("step", "backends", "scaling"), ("sra-small", "dense-small"))
RECIPES |= {"memory": ("sra-128e",), "latency": ("spectral-8m", "spectral-8m-token")}
OPERATORS, PARTS = ("router", "router-grid", "experts", "linear"), ("mixer", "bands", "channel")
READERS = {"recipes": RECIPES, "stages": ["step"], "batch": ["backends"], "micro_batch": ["memory"]}


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("what", choices=(*RECIPES, *OPERATORS, *PARTS))
    parser.add_argument("--recipes", nargs="+", help="the recipe, then its dense twin")
    parser.add_argument("--batch", type=cli.at_least(1), help="windows a step, for backends")
    parser.add_argument("--stages", nargs="*", choices=[*"0123"], default=[*"012"], help="for step")
    parser.add_argument("--rounds", type=cli.at_least(1), default=7, help="of all but memory")
    parser.add_argument("--micro-batch", type=cli.at_least(1), default=2, help="for memory")
    parser.add_argument("--one", choices=("torch", "2"), help=argparse.SUPPRESS)
    return cli.run(cli.parse(parser), command, cli.show_tree)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Dispatch to the measurement."""
    what, rounds = arguments.what, arguments.rounds
    idle = [option for option, readers in READERS.items() if what not in readers]
    idle += ["rounds"] * (what == "memory")
    cli.refuse(arguments, idle, f"has no effect on {what}")
    prepare_process()  # before DeepSpeed is imported, which reads the environment
    from sra_ds.benchmarks import backends, experts, latency, linear, memory, parts, router, scaling
    from sra_ds.benchmarks.step import bench_step

    if what.startswith("router"):
        return router.bench_router(rounds, grid=what == "router-grid")
    if what in OPERATORS:
        return {"experts": experts.bench_experts, "linear": linear.bench_linear}[what](rounds)
    if what in PARTS:
        return parts.bench_parts(what, rounds)
    names = arguments.recipes or RECIPES[what]
    whole = ["training.precision=fp32", "training.micro_batch_size=0"]
    if what == "memory":
        recipe = load_recipe(names[0], [*whole, f"training.batch_size={arguments.micro_batch}"])
        return memory.bench_memory(recipe, {"torch": None, "2": ds_config("2")}, arguments.one)
    if what == "backends":
        whole = whole[1:] + [f"training.batch_size={arguments.batch}"] * bool(arguments.batch)
    recipes = [load_recipe(name, whole) for name in names]
    if what == "backends":
        return backends.bench_backends(*recipes[:2], ds_config("2"), rounds)
    if what == "latency":
        return latency.bench_latency(recipes, rounds)
    if what == "scaling":
        return scaling.bench_scaling(recipes[0], ds_config("2"), rounds)
    return bench_step(recipes, {f"zero{s}": ds_config(s) for s in arguments.stages}, rounds)


def ds_config(stage: str) -> dict[str, Any]:
    return read_ds_config(Path(__file__).resolve().parents[1] / "ds_configs" / f"zero{stage}.json")


if __name__ == "__main__":
    sys.exit(main())
