"""Score a trained run: perplexity per token, word and byte over a whole split or your own text, and the
health of its experts over at least a million tokens."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.evaluation.run import Scoring, score_run
from sra_ds.inference.halting import halted_by
from sra_ds.inference.load import load_run
from sra_ds.inference.steer import steered_by
from sra_ds.training.environment import choose_device, prepare_process


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    parser.add_argument("--text", type=Path, help="score a file or folder instead of the split")
    parser.add_argument(
        "--stride", type=cli.at_least(0), default=0, help="targets per window; 0: all"
    )
    parser.add_argument("--batch-size", type=cli.at_least(1), default=16)
    parser.add_argument("--legacy-sra", action="store_true", help="also the published PAD protocol")
    parser.add_argument(
        "--health-tokens", type=cli.at_least(0), default=1_000_000, help="for dead experts; 0: skip"
    )
    parser.add_argument(
        "--dynamic", action="store_true", help="also while a persistent memory is written on"
    )
    parser.add_argument("--halting", metavar="KIND[:H]", help="soft or hard, at entropy H")
    parser.add_argument("--steer", type=Path, metavar="CARD", help="with this steering")
    return cli.run(parser.parse_args(), command, cli.show_tree)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, score, report."""
    prepare_process()
    device, _ = choose_device()
    loaded = load_run(arguments.run, arguments.checkpoint, device)
    scoring = Scoring(
        arguments.split,
        arguments.text,
        arguments.stride,
        arguments.batch_size,
        arguments.health_tokens,
        arguments.legacy_sra,
        arguments.dynamic,
    )
    with steered_by(loaded, arguments.steer), halted_by(loaded.model, arguments.halting):
        found = score_run(loaded, scoring, device)
    return found if arguments.steer is None else {"steering": str(arguments.steer), **found}


if __name__ == "__main__":
    sys.exit(main())
