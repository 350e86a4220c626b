"""Count the parameters of a recipe or a run, in all and per token, part by part, and the FLOPs that a
token costs in training. Needs no memory."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.config import load_recipe
from sra_ds.model.counting import count_parameters, live_share
from sra_ds.model.flops import flops_per_token
from sra_ds.model.language_model import build_model
from sra_ds.storage.run_dir import open_run


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    cli.add_recipe(parser)
    parser.add_argument("--run", type=Path, help="count the model of a run instead")
    return cli.run(cli.parse(parser), command, cli.show_tree)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Count the model built on the meta device."""
    if arguments.run is not None:
        cli.refuse(arguments, ["recipe"], "has no effect with --run")
        recipe = open_run(arguments.run).recipe(arguments.overrides)
    else:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
    model = build_model(recipe, "meta")
    flops = flops_per_token(model, recipe.data.sequence_length)
    counts = {**count_parameters(model), "training_flops_per_token": round(flops)}
    share = live_share(model)
    sparse = {} if share is None else {"live_share_of_sparse_matrices": share}
    return {"recipe": recipe.name, **counts, **sparse}


if __name__ == "__main__":
    sys.exit(main())
