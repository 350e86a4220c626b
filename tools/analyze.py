"""Say what each expert of a trained run does, with pictures and statistics: report.html, experts.csv,
analysis.json and figures/ in the run directory, or in --out."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.analysis.analysis import Request, analyse, require_routed
from sra_ds.analysis.report import write_report
from sra_ds.errors import ConfigError
from sra_ds.inference.load import load_run
from sra_ds.training.environment import choose_device, prepare_process


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument(
        "--against",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs to put beside it",
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default: the run directory)")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="valid")
    parser.add_argument("--text", type=Path, help="a file or folder instead of the split")
    parser.add_argument("--tokens", type=cli.at_least(2), default=1_000_000, help="at most")
    parser.add_argument("--batch-size", type=cli.at_least(1), default=16)
    parser.add_argument(
        "--sweep-tokens", type=cli.at_least(0), default=16_384,
        help="for perplexity at other k and with fewer experts; 0: leave these out",
    )  # fmt: skip
    parser.add_argument("--map", choices=("pca", "umap"), default="pca", help="of the anchors")
    return cli.run(cli.parse(parser), command, show)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Analyse each run and write the report."""
    if arguments.text is not None:
        cli.refuse(arguments, ["split"], "has no effect with --text")
    out = arguments.out or arguments.run
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    prepare_process()
    device, _ = choose_device()
    request = Request(
        arguments.split, arguments.text, arguments.tokens, arguments.batch_size,
        arguments.sweep_tokens, arguments.map,
    )  # fmt: skip
    paths = (arguments.run, *arguments.against)
    runs = [load_run(path, arguments.checkpoint, device) for path in paths]
    for loaded in runs:  # before minutes are spent on the first
        require_routed(loaded)
    analyses = [analyse(loaded, request, device) for loaded in runs]
    return write_report(analyses, out)


def show(result: dict[str, Any]) -> None:
    """The quoted numbers and where the rest is."""
    for summary in result["summary"]:
        own, untrained = (
            "no share" if share is None else f"{share:.0%}"
            for share in (summary["coherent"], summary["coherent_untrained"])
        )
        print(f"{summary['run']}: {own} of the experts are more coherent than their null "
              f"(chance 5 %, untrained router {untrained})")  # fmt: skip
        cli.show_tree(summary["kinds"], 2)
        print(f"  most coherent over their null: {' '.join(summary['most_coherent'])}")
    print(f"open {result['report']}")


if __name__ == "__main__":
    sys.exit(main())
