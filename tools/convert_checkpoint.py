"""Write a checkpoint of a run anew, as a run directory of its own; OUT is complete or absent.

--reshard ep=N,world=M,zero=Z  files as that layout (default: ep=1,world=1,zero=0; world <= 4096) would
                               write them, with optimizer state; go on with --resume --run OUT. Takes
                               the newest complete checkpoint, as a resumed run does
--consolidate                  whole weights in one model.safetensors. Takes the best checkpoint on
                               validation, or the newest complete if there is none; so does --compress
--compress                     the live weights of prime_masked channels alone; tells size, speed and
                               perplexity before and after (validation split, or --text)
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
from sra_ds.evaluation.compress import compress
from sra_ds.storage.convert import consolidate, parse_layout, reshard
from sra_ds.storage.import_sra import import_sra
from sra_ds.storage.run_dir import RunDir, open_run


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run", type=Path, help="run directory to read")
    parser.add_argument("--out", type=Path, required=True, help="run directory to write")
    parser.add_argument("--checkpoint", help="best (not with --reshard), latest or a step")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--reshard", metavar="ep=N,world=M,zero=Z")
    what.add_argument("--consolidate", action="store_true")
    what.add_argument("--compress", action="store_true")
    what.add_argument("--import-sra", type=Path, metavar="FILE.pt")
    parser.add_argument("--text", type=Path, help="what --compress compares on")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json of the imported model")
    cli.add_recipe(parser, default=None)
    return cli.run(cli.parse(parser), command, cli.show_tree)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert; returns what was written."""
    out, which = RunDir(arguments.out), arguments.checkpoint
    if not arguments.compress:
        cli.refuse(arguments, ["text"], "has an effect only with --compress")
    if arguments.import_sra is not None:
        others = "--reshard, --consolidate and --compress"
        cli.refuse(arguments, ["run", "checkpoint"], f"has an effect only with {others}")
        if None in (arguments.recipe, arguments.tokenizer):
            raise ConfigError("--import-sra needs --recipe and --tokenizer")
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        return import_sra(arguments.import_sra, recipe, arguments.tokenizer, out)
    only_imported = "has an effect only with --import-sra"
    cli.refuse(arguments, ["recipe", "tokenizer"], only_imported)
    if arguments.overrides:
        raise ConfigError(f"{arguments.overrides[0]} {only_imported}; leave it out")
    if arguments.run is None:
        raise ConfigError("--reshard, --consolidate and --compress need --run")
    run = open_run(arguments.run)
    if arguments.compress:
        return compress(run, out, "best" if which is None else which, arguments.text)
    if arguments.consolidate:
        result = consolidate(run, out, "best" if which is None else which)
    else:
        result = reshard(run, out, parse_layout(arguments.reshard), which or "latest")
    for problem in result["passed_over"]:
        print(f"passed over a broken checkpoint: {problem}", file=sys.stderr)
    return result


if __name__ == "__main__":
    sys.exit(main())
