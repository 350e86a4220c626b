"""Take experts out of a model, put them back or elsewhere, or leave some out.

Without a mode --out becomes a folder with two files an expert: its tensors and a card (anchor, load, top
tokens, origin). With a mode it becomes a run directory with weights alone, and the perplexity before and
after is printed, on the run's validation split if its corpus is on this machine:

--merge EXPORT                    experts of a folder, or of one card, go where they came from, into the
                                  model of --run: the same one, or another of the same shape
--transplant EXPORT --as L:E      one exported expert becomes expert E of layer L
--prune dead | least:N | L:E,...  experts go: dead ones (below 1e-4 of their layer's routes), the N least
                                  used of each layer, or named ones, equally many in each layer

Train on with launch/train.py --recipe OUT/recipe.yaml --init-from OUT.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.evaluation.difference import perplexity_difference, validation_split
from sra_ds.inference.export.request import Request, carry_out
from sra_ds.inference.load import load_run
from sra_ds.training.environment import choose_device

MEASURED_TOKENS = 100_000


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, help="run directory to read")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--layer", type=cli.at_least(0), help="export this layer only")
    parser.add_argument("--experts", metavar="0,7,...", help="export these of each layer only")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--merge", type=Path, metavar="EXPORT")
    mode.add_argument("--transplant", type=Path, metavar="EXPORT")
    mode.add_argument("--prune", metavar="WHICH")
    parser.add_argument("--as", dest="place", metavar="L:E", help="where --transplant puts it")
    parser.add_argument(
        "--measure-tokens",
        type=cli.at_least(0),
        help=f"validation tokens for the perplexities; 0: skip (default: {MEASURED_TOKENS})",
    )
    return cli.run(parser.parse_args(), command, cli.show_tree)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Export, or write a changed model and measure it; returns what was written."""
    request = Request(**{name: getattr(arguments, name) for name in Request._fields})
    request.require_sense()
    device, _ = choose_device()
    loaded = load_run(arguments.run, arguments.checkpoint, device)
    if not request.changes_the_model:
        return carry_out(loaded, request, arguments.out)
    tokens = MEASURED_TOKENS if request.measure_tokens is None else request.measure_tokens
    split = validation_split(loaded) if tokens else None
    result = carry_out(loaded, request, arguments.out)
    if split is not None:
        after = load_run(arguments.out, "latest", device)
        result["perplexity"] = perplexity_difference(loaded, after, split, tokens, device)
    elif tokens:
        print("no perplexity: the run's corpus is not on this machine", file=sys.stderr)
    return result


if __name__ == "__main__":
    sys.exit(main())
