"""Change what experts do, and measure what it costs. Experts are named layer:expert, both from 0.

suppress, boost, scale, pin,    write a card for `generate --steer` and `evaluate --steer`, and say
towards, replace                what it costs in perplexity
detect                          experts that tell two files of texts, one a line, apart
attribute                       experts that write words of your own
verify                          dose and response of experts, against 20 others of equal load
effect                          what a card does to words of your own, and what it costs
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.inference.load import load_run
from sra_ds.steering.actions import ACTIONS
from sra_ds.steering.request import carry_out
from sra_ds.training.environment import choose_device, prepare_process


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, action in ACTIONS.items():
        own = cli.add_action(actions, name, action.help)
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
        value = row["slope"] if "slope" in row else row["risk_difference"]
        low, high = (float("nan") if row[n] is None else row[n] for n in ("low", "high"))
        interval = f"[{low:+.3g}, {high:+.3g}]  p {row['p_adjusted']:.3f} (adjusted)"
        print(f"{row['layer']}:{row['expert']:<5} {value:+.3g} {interval}")
    for name, one in result.pop("effect", {}).items():
        change = f"{one['before']:.5g} -> {one['after']:.5g}"
        print(f"{name:<10} {change}  change {told(one['change'])}")
    for row in result.get("verified", []):
        print(f"{row['layer']}:{row['expert']}  {' '.join(row['tokens'])}")
        for name in ("suppression_slope", "boost_slope"):
            print(f"  {name:<18} {told(row[name])}")
        for name, one in row["responses"].items():
            cost = f"KL {one['kl']:.6f}  perplexity x {one['perplexity_ratio']:.4f}"
            print(f"  {name:<10} effect {one['effect']:+.5f}  {cost}")
    cli.show_tree(result)


def told(change: dict[str, float | None]) -> str:
    """A change with its interval and null."""
    one = {name: float("nan") if value is None else value for name, value in change.items()}
    interval = f"[{one['low']:+.3g}, {one['high']:+.3g}]"
    return f"{one['value']:+.3g} {interval}  null {one['null_95']:.3g}, p {one['p']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
