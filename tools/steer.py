"""Change what experts do, and measure what it costs. Experts are named layer:expert, both from 0.

suppress, boost, scale, pin,    write a card for `generate --steer` and `evaluate --steer`, and say
towards, replace                what it costs in perplexity
detect                          experts that tell two files of texts, one a line, apart
verify                          dose and response of experts, against 20 others of equal load
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.analysis.steering import ACTIONS, carry_out
from sra_ds.inference.load import load_run
from sra_ds.training.environment import choose_device, prepare_process


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, action in ACTIONS.items():
        own = actions.add_parser(name, help=action.help, description=action.help)
        if action.names_experts:
            own.add_argument("experts", nargs="+", metavar="LAYER:EXPERT")
        if action.makes_card:
            own.add_argument(
                "--out", type=Path, required=True, metavar="CARD", help="card to write"
            )
            own.add_argument("--name", default="", help="of the card (default: what it does)")
        for option, settings in action.options.items():
            own.add_argument(option, **settings)
    return cli.run(parser.parse_args(), command, show)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Open the run and act."""
    prepare_process()
    device, _ = choose_device()
    loaded = load_run(arguments.run, arguments.checkpoint, device)
    return carry_out(loaded, arguments.action, vars(arguments), device)


def show(result: dict[str, Any]) -> None:
    """Experts as tables, anything else as a tree."""
    for row in result.get("experts", [])[: result.get("top", 0)]:
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        where = f"{row['layer']}:{row['expert']}"
        print(
            f"{where:<7} {row['risk_difference']:+.4f} {interval}  p {row['p_adjusted']:.3f} (adjusted)"
        )
    for row in result.get("verified", []):
        print(f"{row['layer']}:{row['expert']}  {' '.join(row['tokens'])}")
        for name in ("suppression_slope", "boost_slope"):
            slope = {key: float("nan") if v is None else v for key, v in row[name].items()}
            interval = f"[{slope['low']:+.5f}, {slope['high']:+.5f}]"
            null = f"null {slope['null_95']:.5f}, p {slope['p']:.3f}"
            print(f"  {name:<18} {slope['value']:+.5f} {interval}  {null}")
        for name, one in row["responses"].items():
            cost = f"KL {one['kl']:.6f}  perplexity x {one['perplexity_ratio']:.4f}"
            print(f"  {name:<10} effect {one['effect']:+.5f}  {cost}")
    cli.show_tree(result)


if __name__ == "__main__":
    sys.exit(main())
