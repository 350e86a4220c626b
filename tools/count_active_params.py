"""Count a recipe's or a run's parameters, in all and per token, part by part. Needs no memory."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.config import load_recipe
from sra_ds.model.counting import count_parameters
from sra_ds.model.language_model import build_model
from sra_ds.storage.run_dir import open_run


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    cli.add_recipe(parser)
    parser.add_argument("--run", type=Path, help="count the model of a run instead")
    return cli.run(parser.parse_intermixed_args(), command, cli.show_tree)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Count the model built on the meta device."""
    if arguments.run is not None:
        recipe = open_run(arguments.run).recipe(arguments.overrides)
    else:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
    return {"recipe": recipe.name, **count_parameters(build_model(recipe, "meta"))}


if __name__ == "__main__":
    sys.exit(main())
