"""Continue one prompt or several with a trained run's model, each as if it were alone.

One prompt is written as it grows; of several each text comes when its batch is done, in order. The seed
and the prompt decide what is drawn. With --json one prompt gives its text, several give a list `texts`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.inference.generate import Sampling, generate, generate_batch, read_prompts
from sra_ds.inference.halting import halted_by
from sra_ds.inference.load import LoadedRun, load_run
from sra_ds.inference.steer import steered_by
from sra_ds.training.environment import choose_device


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--prompt", action="append", default=[], help="one or several openings")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt on each line")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--max-tokens", type=cli.at_least(1), default=100, help="new ones at most")
    parser.add_argument("--batch-size", type=cli.at_least(1), default=16, help="prompts at a time")
    parser.add_argument("--temperature", type=cli.at_least(0.0), default=0.8, help="0: most likely")
    parser.add_argument("--top-k", type=cli.at_least(0), default=0, help="0: all tokens")
    parser.add_argument("--top-p", type=cli.at_least(1e-6), default=0.95, help="1: all tokens")
    parser.add_argument(
        "--repetition-penalty", type=cli.at_least(0.01), default=1.0, help="above 1: fewer (1: off)"
    )
    parser.add_argument("--seed", type=cli.at_least(0), default=0)
    parser.add_argument("--steer", type=Path, metavar="CARD", help="with this steering")
    parser.add_argument("--halting", metavar="KIND[:H]", help="soft or hard, at entropy H")
    return cli.run(parser.parse_args(), command, lambda result: None)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Continue every prompt; returns the texts."""
    prompts = read_prompts(arguments.prompt, arguments.prompts)
    device, _ = choose_device()
    loaded = load_run(arguments.run, arguments.checkpoint, device)
    sampling = Sampling(**{name: getattr(arguments, name) for name in Sampling._fields})
    with steered_by(loaded, arguments.steer), halted_by(loaded.model, arguments.halting):
        if len(prompts) == 1 and not arguments.json:
            return stream(loaded, prompts[0], arguments.max_tokens, sampling)
        return continue_all(loaded, prompts, arguments, sampling)


def continue_all(
    loaded: LoadedRun, prompts: list[str], arguments: argparse.Namespace, sampling: Sampling
) -> dict[str, Any]:
    """Batch by batch; each text is printed when its batch is done."""
    texts = []
    for start in range(0, len(prompts), arguments.batch_size):
        batch = prompts[start : start + arguments.batch_size]
        for found in generate_batch(
            loaded.model, loaded.tokenizer, batch, arguments.max_tokens, sampling
        ):
            texts.append(found._asdict())
            if not arguments.json:
                print(f"{found.prompt}{found.text}\n", flush=True)
    told = {"texts": texts} if len(texts) > 1 else texts[0]
    return {**told, "sampling": sampling._asdict()}


def stream(loaded: LoadedRun, prompt: str, tokens: int, sampling: Sampling) -> dict[str, Any]:
    """Write a text to standard output as it grows."""
    print(prompt, end="", flush=True)
    for piece in generate(loaded.model, loaded.tokenizer, prompt, tokens, sampling):
        print(piece, end="", flush=True)
    print()
    return {}


if __name__ == "__main__":
    sys.exit(main())
