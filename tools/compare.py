"""Compare recipes over seeds on the same tokens in the same order, or finished runs or cells."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.analysis.plots import draw_comparison
from sra_ds.evaluation.compare.budgets import MATCHES
from sra_ds.evaluation.compare.cells import cells_of, read_sweep
from sra_ds.evaluation.compare.finished import cell_of_run, read_cell
from sra_ds.evaluation.compare.tables import compare, markdown, write_tables
from sra_ds.evaluation.compare.training import Launch, train_cells

ROOT = Path(__file__).resolve().parents[1]
ZERO0 = ROOT / "ds_configs" / "zero0.json"
TRAINING = ("set", "seeds", "jobs", "processes", "deepspeed", "train_in")


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    chosen = parser.add_mutually_exclusive_group(required=True)
    several: dict[str, Any] = {"action": "extend", "nargs": "+"}
    chosen.add_argument("--recipes", **several, metavar="NAME", help="train these, then compare")
    chosen.add_argument("--sweep", metavar="NAME|FILE", help="train the variants of a recipe")
    chosen.add_argument("--runs", **several, type=Path, metavar="DIR", help="finished runs")
    chosen.add_argument("--cells", **several, type=Path, metavar="JSON", help="finished cells")
    parser.add_argument("--seeds", type=cli.integers, default="0,1,2", help="comma-separated")
    parser.add_argument(
        "--set", **several, default=[], metavar="key.path=value", help="for all recipes"
    )
    parser.add_argument(
        "--matched", **several, choices=MATCHES, default=[], help="what must agree within 2 %%"
    )
    parser.add_argument("--against", metavar="NAME", help="what the others differ from (the first)")
    parser.add_argument("--jobs", type=cli.at_least(1), default=1, help="runs trained at a time")
    parser.add_argument("--processes", type=cli.at_least(1), default=1, help="of each run")
    parser.add_argument(
        "--deepspeed", type=Path, default=ZERO0, metavar="JSON", help="(default: zero0.json)"
    )
    parser.add_argument("--out", type=Path, help="cells and tables (runs/compare; finished: none)")
    parser.add_argument("--train-in", type=Path, metavar="DIR", help="folder of the runs (--out)")
    return cli.run(cli.parse(parser), command, show)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, then compare."""
    out: Path | None = arguments.out
    if not arguments.given & {"recipes", "sweep"}:
        cli.refuse(arguments, TRAINING, "has an effect only with --recipes or --sweep")
    if arguments.cells is not None:
        cells = [read_cell(path) for path in arguments.cells]
    elif arguments.runs is not None:
        cells = [cell_of_run(path) for path in arguments.runs]
    else:
        out = out or Path("runs/compare")
        asked = (arguments.set, arguments.seeds)
        script = ROOT / "launch" / "train.py"
        launch = Launch(script, arguments.deepspeed, arguments.processes, arguments.jobs)
        cells = train_cells(
            read_sweep(arguments.sweep, *asked)
            if arguments.sweep is not None
            else cells_of(arguments.recipes, *asked),
            launch, out, arguments.train_in or out, arguments.matched,
        )  # fmt: skip
    result = compare(cells, arguments.against, arguments.matched)
    if out is not None:
        write_tables(result, cells, draw_comparison, out)
    return result


def show(result: dict[str, Any]) -> None:
    """The markdown table."""
    print(markdown(result))


if __name__ == "__main__":
    sys.exit(main())
