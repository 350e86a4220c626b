"""Compare recipes over seeds on the same tokens in the same order, or runs that are finished."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.analysis.plots import draw_comparison
from sra_ds.errors import ConfigError
from sra_ds.evaluation.compare import cells_of, compare_runs, markdown, read_sweep, run_cells

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    chosen = parser.add_mutually_exclusive_group(required=True)
    several: dict[str, Any] = {"action": "extend", "nargs": "+"}
    chosen.add_argument("--runs", **several, type=Path, metavar="DIR", help="finished runs")
    chosen.add_argument("--recipes", **several, metavar="NAME", help="train these, then compare")
    chosen.add_argument("--sweep", metavar="NAME|FILE", help="train the variants of a recipe")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--set", **several, default=[], metavar="key.path=value", help="for all recipes"
    )
    parser.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero0.json")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="runs and tables")
    return cli.run(parser.parse_args(), command, show)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, then compare."""
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {arguments.seeds}: expected numbers such as 0,1,2") from None
    runs = arguments.runs
    if runs is None:
        launch = [sys.executable, str(ROOT / "launch" / "train.py"), "--deepspeed"]
        launch += [str(arguments.deepspeed)]
        cells = (
            cells_of(arguments.recipes, arguments.set)
            if arguments.sweep is None
            else read_sweep(arguments.sweep, arguments.set)
        )
        runs = run_cells(cells, seeds, arguments.out, launch)
    return compare_runs(runs, draw_comparison, arguments.out)


def show(result: dict[str, Any]) -> None:
    """The markdown table."""
    print(markdown(result["rows"], result["differences"]))


if __name__ == "__main__":
    sys.exit(main())
