"""Write a checkpoint of a run anew, as a run directory of its own.

--reshard ep=N,world=M,zero=Z  files as that layout would write them, with optimizer state; go on with
                               --resume --run OUT
--consolidate                  whole weights in one model.safetensors
--import-sra FILE.pt           take the weights of the published SRA code instead of a run's
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.config import load_recipe
from sra_ds.errors import ConfigError
from sra_ds.storage.convert import consolidate, parse_layout, reshard
from sra_ds.storage.import_sra import import_sra
from sra_ds.storage.run_dir import RunDir, open_run


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run", type=Path, help="run directory to read")
    parser.add_argument("--out", type=Path, required=True, help="run directory to write")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step (consolidate)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--reshard", metavar="ep=N,world=M,zero=Z")
    what.add_argument("--consolidate", action="store_true")
    what.add_argument("--import-sra", type=Path, metavar="FILE.pt")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json of the imported model")
    cli.add_recipe(parser, default=None)
    return cli.run(parser.parse_intermixed_args(), command, cli.show_tree)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert; returns what was written."""
    out = RunDir(arguments.out)
    if arguments.import_sra:
        if not (arguments.recipe and arguments.tokenizer):
            raise ConfigError("--import-sra needs --recipe and --tokenizer")
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        return import_sra(arguments.import_sra, recipe, arguments.tokenizer, out)
    if not arguments.run:
        raise ConfigError("--reshard and --consolidate need --run")
    run = open_run(arguments.run)
    if arguments.reshard:
        return reshard(run, out, parse_layout(arguments.reshard))
    return consolidate(run, out, arguments.checkpoint)


if __name__ == "__main__":
    sys.exit(main())
