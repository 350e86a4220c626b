"""Say, token by token and layer by layer, which experts a text goes to, how close it was, and what those
experts are known for (after tools/analyze.py)."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.analysis.explain import explain, table
from sra_ds.analysis.report import explanation_html
from sra_ds.errors import ConfigError
from sra_ds.inference.load import load_run
from sra_ds.inference.steer import steered_by
from sra_ds.storage.run_dir import require_file, write_atomically
from sra_ds.training.environment import choose_device


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--text", required=True, help="the text itself")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--near", type=cli.at_least(0), default=3, help="near misses to show")
    parser.add_argument("--layer", type=cli.at_least(0), help="show this layer alone")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page to look at")
    parser.add_argument("--steer", type=Path, metavar="CARD", help="with this steering")
    return cli.run(parser.parse_args(), command, show)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Explain, and write the page if asked for."""
    if arguments.html is not None:
        require_file(arguments.html, "--html")
    device, _ = choose_device()
    loaded = load_run(arguments.run, arguments.checkpoint, device)
    layers = len(loaded.model.routers())
    if arguments.layer is not None and arguments.layer >= layers > 0:
        raise ConfigError(
            f"--layer {arguments.layer}: the model has {layers} routed layers, from 0"
        )
    with steered_by(loaded, arguments.steer):
        explanation = explain(loaded, arguments.text, arguments.near)
    if arguments.html is not None:
        write_atomically(arguments.html, explanation_html(explanation, loaded.run.path.name))
    if not arguments.json:
        print("\n".join(table(explanation, arguments.layer)))
    page = None if arguments.html is None else str(arguments.html)
    return {"run": str(arguments.run), "html": page, **explanation.as_dict()}


def show(result: dict[str, Any]) -> None:
    """The table is printed already."""
    if result["html"]:
        print(f"open {result['html']}")


if __name__ == "__main__":
    sys.exit(main())
