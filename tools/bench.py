"""Measure on this machine, as ratios within one run.

step    step time of a recipe over its dense twin, and of the DeepSpeed engine over plain torch
memory  peak memory of one training step, in plain torch and at ZeRO-2, each in a fresh process
"""

import argparse
import json
import sys
from typing import Any

from sra_ds import cli
from sra_ds.config import load_recipe
from sra_ds.training.environment import prepare_process


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("what", choices=("step", "memory"))
    parser.add_argument("--recipes", nargs="+", help="the recipe, then its dense twin")
    parser.add_argument("--stages", default="0,1,2", help="ZeRO stages (default: %(default)s)")
    parser.add_argument("--rounds", type=cli.at_least(1), default=7)
    parser.add_argument(
        "--micro-batch", type=cli.at_least(1), default=2, help="windows, for memory"
    )
    parser.add_argument("--one", choices=("torch", "0", "1", "2", "3"), help=argparse.SUPPRESS)
    return cli.run(parser.parse_args(), command, cli.show_tree)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Dispatch to the measurement."""
    prepare_process()
    from sra_ds.training import bench  # DeepSpeed reads the environment when it is imported

    if arguments.what == "step":
        names = arguments.recipes or ["sra-small", "dense-small"]
        recipes = [load_recipe(name, ["training.precision=fp32"]) for name in names]
        stages = [int(stage) for stage in arguments.stages.split(",") if stage]
        return bench.bench_step(recipes, stages, arguments.rounds)
    names = arguments.recipes or ["sra-128e"]
    if arguments.one:
        size = f"training.batch_size={arguments.micro_batch}"
        recipe = load_recipe(
            names[0], [size, "training.micro_batch_size=0", "training.precision=fp32"]
        )
        stage = None if arguments.one == "torch" else int(arguments.one)
        return bench.peak_memory_of_one_step(recipe, stage)
    common = [sys.argv[0], "memory", "--json", "--micro-batch", str(arguments.micro_batch)]
    return {
        variant: json.loads(
            bench.in_fresh_process([*common, "--recipes", names[0], "--one", variant])
        )
        for variant in ("torch", "2")
    }


if __name__ == "__main__":
    sys.exit(main())
