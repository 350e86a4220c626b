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
from sra_ds.errors import ConfigError
from sra_ds.planning.report import make_plan
from sra_ds.planning.request import Options, make_request
from sra_ds.planning.study import study, study_table
from sra_ds.planning.table import render
from sra_ds.training.ds_config import read_ds_config

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
STUDIED = ("sra-128e", "sra-1b", "sra-8b")


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    cli.add_recipe(parser)
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    add("--gpus", type=cli.at_least(1), help="of all nodes (1)")
    add("--nodes", type=cli.at_least(1), help="(1)")
    add("--gpu", help="A100 80GB, H100, ...; else the usual one of --gpu-memory")
    add("--gpu-memory", help="of one GPU, with unit (that of --gpu, else 24GB)")
    add("--host-memory", help="of one node, with unit (256GB per GPU)")
    add("--intra-node", type=cli.at_least(0.001), help="GB/s per GPU, one direction")
    add("--inter-node", type=cli.at_least(0.001), help="GB/s per GPU (50)")
    add("--efficiency", type=cli.at_least(0.001), help="share of the peak FLOP/s (0.35)")
    add("--tokens", type=cli.at_least(1.0), help="budget; else the recipe's steps")
    add("--price", type=cli.at_least(0.0), help="of one GPU for one hour")
    add("--study", type=Path, help="folder: write the scaling study there, and nothing else")
    return cli.run(parser.parse_intermixed_args(), command, show)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan one recipe, or write the study."""
    configs = {path.name: read_ds_config(path) for path in sorted(CONFIGS.glob("*.json"))}
    given = {name: value for name, value in vars(arguments).items() if name in Options._fields}
    if "study" in arguments:
        if given or arguments.overrides or arguments.recipe != "quickstart":
            raise ConfigError(
                "--study has its own recipes and machines: leave out all other options"
            )
        return write_study(arguments.study, configs)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    overrides = tuple(arguments.overrides)
    return make_plan(make_request(recipe, Options(**given), arguments.recipe, overrides), configs)


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
