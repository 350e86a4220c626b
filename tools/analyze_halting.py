"""How a trained resonance model halts: the tokens it iterates on longest, and what stopping earlier would
cost in perplexity and save in time.

Each threshold H of the relative entropy is tried as `hard:H`, which `evaluate` and `generate` take as
--halting. Writes halting.json, halting.png and iterations_by_type.png.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.analysis.iterations import count_iterations, iterations_by_type
from sra_ds.analysis.resonance_plots import halting_figure, iterations_by_type_figure
from sra_ds.errors import ConfigError
from sra_ds.evaluation.halting import halting_sweep
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import load_run
from sra_ds.storage.run_dir import write_atomically
from sra_ds.training.environment import choose_device, prepare_process


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument(
        "--thresholds", default="0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9", metavar="H,H,..."
    )
    parser.add_argument(
        "--text", type=Path, help="a file or folder instead of the validation split"
    )
    parser.add_argument("--tokens", type=cli.at_least(0), default=0, help="scored; 0: all")
    parser.add_argument("--typed-tokens", type=cli.at_least(2), default=100_000, help="looked at")
    parser.add_argument("--timed-tokens", type=cli.at_least(1), default=20_000)
    parser.add_argument("--out", type=Path, help="folder (default: the run's evaluation/)")
    return cli.run(parser.parse_args(), command, show)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score and time every rule, and count over kinds of tokens."""
    try:
        thresholds = [float(text) for text in arguments.thresholds.split(",")]
    except ValueError:
        raise ConfigError(f"--thresholds {arguments.thresholds}: numbers such as 0.4,0.6") from None
    prepare_process()
    device, _ = choose_device()
    loaded = load_run(arguments.run, arguments.checkpoint, device)
    with open_text(loaded, "valid", arguments.text) as text:
        rows = halting_sweep(
            loaded, text.split, thresholds, arguments.tokens, arguments.timed_tokens, device
        )
        counted = count_iterations(loaded, text.split, arguments.typed_tokens, 16, device)
        types = iterations_by_type(loaded, counted)
        found = {"run": str(loaded.run.path), "text": text.label, "rules": rows, "types": types}
    out = arguments.out or loaded.run.evaluation
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "halting.json", json.dumps(found, indent=1))
    halting_figure(rows, out / "halting.png")
    iterations_by_type_figure(types, out / "iterations_by_type.png")
    return found


def show(found: dict[str, Any]) -> None:
    """Two tables."""
    times = (f"{part}_time_over_soft" for part in ("model", "mixers", "decoding"))
    names = ("token_perplexity", "iterations", *times)
    print(f"{'rule':<12}" + "".join(f"{name:>26}" for name in names))
    for row in found["rules"]:
        print(f"{row['rule']:<12}" + "".join(f"{row[name]:>26.3f}" for name in names))
    for name, own in sorted(found["types"]["classes"].items(), key=lambda x: -x[1]["iterations"]):
        print(f"{name:<14}{own['iterations']:>7.3f} [{own['low']:.3f}, {own['high']:.3f}]")


if __name__ == "__main__":
    sys.exit(main())
