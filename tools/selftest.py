"""Check on this machine that every layout trains the same model: expert parallelism, ZeRO 0-3, activation
checkpointing and backends against plain torch, and runs that are killed and resumed. Exit 1 if not."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.training.environment import prepare_process

ROOT = Path(__file__).resolve().parents[1]
DIFFERENCES = ("loss_difference", "update_difference", "resumed_loss_difference")


def main() -> int:
    """Parse, run, and turn a mismatch into exit code 1."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--world", type=int, choices=(1, 2, 4), default=2, help="processes")
    parser.add_argument(
        "--kills", type=cli.at_least(0), default=1, help="SIGKILLs of a training run; 0: skip"
    )
    outcome: dict[str, Any] = {}

    def command(arguments: argparse.Namespace) -> dict[str, Any]:
        outcome.update(check(arguments))
        return outcome

    code = cli.run(parser.parse_args(), command, show)
    return code if code or outcome["passed"] else 1


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases, then the killed run."""
    prepare_process()
    from sra_ds.selftest import compare_layouts, kill_and_resume  # DeepSpeed reads the environment

    with tempfile.TemporaryDirectory() as name:
        rows = compare_layouts(arguments.world, Path(name))
        passed, killed = all(row["passed"] for row in rows), None
        if arguments.kills:
            script, config = ROOT / "launch" / "train.py", ROOT / "ds_configs" / "zero2.json"
            killed = kill_and_resume(script, config, arguments.world, Path(name), arguments.kills)
            passed = passed and killed["loss_difference"] < 1e-6
    return {"world": arguments.world, "passed": passed, "layouts": rows, "killed": killed}


def show(result: dict[str, Any]) -> None:
    """A table for people; differences are against plain torch in one process, bytes of one step and all
    processes are those tools/plan.py counts on."""
    print(f"{'ZeRO':<5}{'backend':<11}{'ep':<4}{'recompute':<11}{'kernel':<11}", end="")
    print(f"{'loss':>9}{'update':>10}{'resumed':>10}{'kB sent':>10}")
    for row in result["layouts"]:
        recompute = "yes" if row["recompute"] else "no"
        print(f"{row['zero']:<5}{row['backend']:<11}{row['expert_parallel']:<4}", end="")
        print(f"{recompute:<11}{row['kernel']:<11}", end=" ")
        print(" ".join(f"{row[name]:9.1e}" for name in DIFFERENCES), end="")
        print(f"{row['bytes_sent'] / 1e3:10,.1f}", end="  ")
        print("" if row["bytes_as_planned"] else "(NOT AS PLANNED) ", end="")
        print("same" if row["passed"] else f"DIFFERENT ({row['worst_parameter']})")
    if result["killed"]:
        killed = result["killed"]
        print(f"killed {killed['kills']} times: losses differ by {killed['loss_difference']:.1e}")
    print("all the same" if result["passed"] else "NOT all the same")


if __name__ == "__main__":
    sys.exit(main())
