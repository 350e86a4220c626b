"""Write a checkpoint of a run anew, as a run directory of its own; OUT is complete or absent.

--reshard ep=N,world=M,zero=Z  files as that layout (default: ep=1,world=1,zero=0; world <= 4096) would
                               write them, with optimizer state; go on with --resume --run OUT. Takes
                               the newest complete checkpoint, as a resumed run does
--consolidate                  whole weights in one model.safetensors. Takes the best checkpoint on
                               validation, or the newest complete if the run keeps no best
--import-sra FILE.pt           take the weights of the published SRA code instead of a run's; needs
                               --recipe and --tokenizer
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
    parser.add_argument(
        "--checkpoint",
        help="best (not with --reshard), latest or a step (default: best, or latest with --reshard)",
    )
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
    if arguments.import_sra is not None:
        asked = {"--run": arguments.run, "--checkpoint": arguments.checkpoint}
        _refuse(asked, "--reshard and --consolidate")
        if arguments.recipe is None or arguments.tokenizer is None:
            raise ConfigError("--import-sra needs --recipe and --tokenizer")
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        return import_sra(arguments.import_sra, recipe, arguments.tokenizer, out)
    asked = {"--recipe": arguments.recipe, "--tokenizer": arguments.tokenizer}
    _refuse({**asked, **dict.fromkeys(arguments.overrides, "")}, "--import-sra")
    if arguments.run is None:
        raise ConfigError("--reshard and --consolidate need --run")
    run, which = open_run(arguments.run), arguments.checkpoint
    if arguments.reshard is None:
        result = consolidate(run, out, "best" if which is None else which)
    else:
        layout = parse_layout(arguments.reshard)
        result = reshard(run, out, layout, "latest" if which is None else which)
    for problem in result["passed_over"]:
        print(f"passed over a broken checkpoint: {problem}", file=sys.stderr)
    return result


def _refuse(given: dict[str, Any], only_for: str) -> None:
    """Raise `ConfigError` for an option that would have no effect."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name} has an effect only with {only_for}; leave it out")


if __name__ == "__main__":
    sys.exit(main())
