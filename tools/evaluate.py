"""Score a trained run: perplexity per token, word and byte over a whole split or your own text, and the
health of its experts over at least a million tokens. With --coherence the texts it writes instead, beside
human and spoilt ones; also written to the run's evaluation/coherence*.json and figures/coherence*.png."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.analysis.coherence_plots import write_coherence
from sra_ds.evaluation.coherence.report import Request, named, score_coherence
from sra_ds.evaluation.run import USUAL, Scoring, score_run
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
    parser.set_defaults(**USUAL)
    parser.add_argument("--stride", type=cli.at_least(0), help="targets a window (0: all)")
    parser.add_argument("--batch-size", type=cli.at_least(1), help="windows at a time")
    parser.add_argument("--legacy-sra", action="store_true", help="also the published PAD protocol")
    parser.add_argument("--health-tokens", type=cli.at_least(0), help="for dead experts; 0: skip")
    parser.add_argument(
        "--dynamic", action="store_true", help="also while a persistent memory is written on"
    )
    parser.add_argument("--halting", metavar="KIND[:H]", help="soft or hard, at entropy H")
    parser.add_argument("--steer", type=Path, metavar="CARD", help="with this steering")
    own = parser.add_argument_group("coherence")
    own.add_argument("--coherence", action="store_true", help="of texts that the run writes")
    own.add_argument("--documents", type=cli.at_least(1), help="human texts, at most (200)")
    own.add_argument("--seeds", type=cli.at_least(1), help="texts for each prompt (1)")
    own.add_argument("--baseline", type=Path, metavar="RUN|HF_DIR", help="continues them, too")
    own.add_argument("--judge", type=Path, metavar="RUN|HF_DIR", help="of all texts (the run)")
    own.add_argument("--gap", type=Path, metavar="FILE", help="GAP, .tsv: whom pronouns stand for")
    own.add_argument(
        "--litbank", type=Path, metavar="FILE", help="LitBank, .conll: check of lemmas"
    )
    return cli.run(cli.parse(parser), command, cli.show_tree)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, score, report."""
    prepare_process()
    device, _ = choose_device()
    if arguments.coherence:
        cli.refuse(arguments, USUAL, "has no effect with --coherence")
    else:
        cli.refuse(arguments, {*Request._fields} - {"split", "text"}, "goes with --coherence")
    if arguments.text is not None:
        cli.refuse(arguments, ["split"], "has no effect with --text")
    loaded = load_run(arguments.run, arguments.checkpoint, device)
    scoring = Scoring(
        arguments.split, arguments.text, arguments.stride, arguments.batch_size,
        arguments.health_tokens, arguments.legacy_sra, arguments.dynamic,
    )  # fmt: skip
    steering = {} if arguments.steer is None else {"steering": str(arguments.steer)}
    with (
        steered_by(loaded, arguments.steer, arguments.split, arguments.text),
        halted_by(loaded.model, arguments.halting),
    ):
        if not arguments.coherence:
            return {**steering, **score_run(loaded, scoring, device)}
        chosen = arguments.given.intersection(Request._fields)
        request = Request(**{name: getattr(arguments, name) for name in chosen})
        found = {**steering, **score_coherence(loaded, request, device)}
    write_coherence(found, loaded.run, named(request, arguments.steer, arguments.halting))
    return found


if __name__ == "__main__":
    sys.exit(main())
