"""What a recipe needs on a cluster, from closed forms: memory, bytes sent, step time, days and cost.

Plans every configuration of ds_configs/ with every expert-parallel size and recommends one, with the
command that starts it. Memory and bytes are checked against CPU processes, times against nothing: they
follow from data sheets and --efficiency. docs/scaling.md has the formulas and a study up to 4,096 GPUs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.analysis.plots import scaling_figure
from sra_ds.config import load_recipe
from sra_ds.planning.hardware import EFFICIENCY, choose_gpu, make_network, parse_memory
from sra_ds.planning.plan import Request
from sra_ds.planning.report import make_plan
from sra_ds.planning.step_time import make_machine
from sra_ds.planning.study import study, study_table
from sra_ds.planning.table import render
from sra_ds.training.ds_config import read_ds_config

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
STUDIED = ("sra-128e", "sra-1b", "sra-8b")


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    cli.add_recipe(parser)
    parser.add_argument("--gpus", type=cli.at_least(1), default=1, help="of all nodes (1)")
    parser.add_argument("--nodes", type=cli.at_least(1), default=1)
    parser.add_argument("--gpu-memory", default="24GB", help="of one GPU, with unit (24GB)")
    parser.add_argument("--gpu", help="A100 80GB, H100, ...; else the usual one of that memory")
    parser.add_argument(
        "--intra-node", type=cli.at_least(0.001), help="GB/s per GPU, one direction"
    )
    parser.add_argument("--inter-node", type=cli.at_least(0.001), help="GB/s per GPU (50)")
    parser.add_argument("--efficiency", type=cli.at_least(0.001), default=EFFICIENCY)
    parser.add_argument("--tokens", type=cli.at_least(1.0), help="budget; else the recipe's steps")
    parser.add_argument("--price", type=cli.at_least(0.0), help="of one GPU for one hour")
    parser.add_argument("--study", type=Path, help="folder: write the scaling study there instead")
    return cli.run(parser.parse_intermixed_args(), command, show)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan one recipe, or write the study."""
    configs = {path.name: read_ds_config(path) for path in sorted(CONFIGS.glob("*.json"))}
    if arguments.study is not None:
        return write_study(arguments.study, configs)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    memory = parse_memory(arguments.gpu_memory)
    gpu = choose_gpu(arguments.gpu, memory)
    links = (arguments.intra_node, arguments.inter_node)
    network = make_network(arguments.gpus, arguments.nodes, gpu, *links)
    machine = make_machine(gpu, network, arguments.efficiency)
    asked = (arguments.tokens, arguments.price, arguments.recipe, tuple(arguments.overrides))
    return make_plan(Request(recipe, machine, memory, *asked), configs)


def write_study(folder: Path, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """study.json, study.md and study.png."""
    found = study([load_recipe(name) for name in STUDIED], configs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    tables = [f"{kind}\n\n{study_table(found[kind])}" for kind in ("weak", "strong")]
    (folder / "study.md").write_text("\n".join(tables), "utf-8")
    scaling_figure(found, folder / "study.png")
    return {"written": str(folder), "rows": len(found["weak"]) + len(found["strong"])}


def show(result: dict[str, Any]) -> None:
    """The plan as text, or what was written."""
    print(render(result)) if "candidates" in result else cli.show_tree(result)


if __name__ == "__main__":
    sys.exit(main())
