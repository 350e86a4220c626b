"""Continue a prompt with a trained run's model."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.inference.generate import Sampling, generate
from sra_ds.inference.load import load_run
from sra_ds.training.environment import choose_device


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--prompt", required=True, help="opening of the text")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument(
        "--max-tokens", type=cli.at_least(1), default=100, help="new tokens at most"
    )
    parser.add_argument("--temperature", type=cli.at_least(0.0), default=0.8, help="0: most likely")
    parser.add_argument("--top-k", type=cli.at_least(0), default=0, help="0: all tokens")
    parser.add_argument("--top-p", type=cli.at_least(1e-6), default=0.95)
    parser.add_argument("--seed", type=cli.at_least(0), default=0)
    return cli.run(parser.parse_args(), command, lambda result: None)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Stream the text, or collect it for --json."""
    device, _ = choose_device()
    loaded = load_run(arguments.run, arguments.checkpoint, device)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    pieces = []
    if not arguments.json:
        print(arguments.prompt, end="", flush=True)
    for piece in generate(
        loaded.model, loaded.tokenizer, arguments.prompt, arguments.max_tokens, sampling
    ):
        pieces.append(piece)
        if not arguments.json:
            print(piece, end="", flush=True)
    if not arguments.json:
        print()
    return {"prompt": arguments.prompt, "text": "".join(pieces), "sampling": sampling._asdict()}


if __name__ == "__main__":
    sys.exit(main())
