"""Train one run: deepspeed launch/train.py --deepspeed ds_configs/zero2.json [--recipe NAME] ...

Also runs under torchrun and plain python. Without --recipe it trains `quickstart`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.config import load_recipe
from sra_ds.errors import ConfigError
from sra_ds.storage.run_dir import RunDir, new_run_dir, newest_run, open_run
from sra_ds.training.environment import DEVICES, leave, prepare_process, rank, world_size


def main() -> int:
    """Parse, train, print the summary."""
    parser = cli.parser(__doc__ or "")
    cli.add_recipe(parser, default=None)
    parser.add_argument(
        "--deepspeed", type=Path, required=True, metavar="JSON", help="ds_configs/*.json"
    )
    parser.add_argument("--run", type=Path, help="run directory (default: runs/<recipe>-<time>)")
    parser.add_argument("--resume", action="store_true", help="continue --run, or the newest run")
    parser.add_argument(
        "--init-from", type=Path, metavar="RUN", help="start from another run's weights"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="mps was never tried")
    parser.add_argument("--dry-run", action="store_true", help="resolve everything, then stop")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    code = cli.run(parser.parse_intermixed_args(), command, show)
    if code or world_size() > 1:
        leave(code)
    return code


def command(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Resolve the run, then train it or describe it."""
    prepare_process(arguments.device)
    from sra_ds import workflow  # DeepSpeed reads the environment when it is imported

    if arguments.resume and arguments.run and arguments.recipe:
        raise ConfigError("--resume takes the recipe from --run; leave --recipe out")
    if arguments.resume and arguments.init_from:
        raise ConfigError(
            "--resume continues a run, --init-from starts a new one: give one of them"
        )
    run, recipe = _run_and_recipe(arguments)
    resolved = workflow.resolve(recipe, arguments.deepspeed)
    if arguments.dry_run:
        return workflow.dry_run(resolved, run) if rank() == 0 else None
    summary = workflow.train(resolved, run, arguments.resume, arguments.init_from)
    workflow.finish_processes()
    return summary


def _run_and_recipe(arguments: argparse.Namespace) -> tuple[RunDir, Any]:
    if not arguments.resume:
        recipe = load_recipe(arguments.recipe or "quickstart", arguments.overrides)
        return (RunDir(arguments.run) if arguments.run else new_run_dir(recipe)), recipe
    if arguments.run:
        run = open_run(arguments.run)
    else:
        run = newest_run(load_recipe(arguments.recipe or "quickstart").name)
    return run, run.recipe(arguments.overrides)


def show(result: dict[str, Any]) -> None:
    """The summary for people, or the facts of a dry run."""
    if "validation" not in result:
        cli.show_tree(result)
        return
    validation, experts, run = result["validation"], result["experts"], result["run"]
    perplexity = (
        f"{validation['token_perplexity']:.2f} per token, "
        f"{validation['word_perplexity']:.1f} per word, "
        f"{validation['bits_per_byte']:.3f} bits per byte"
    )
    params = result["params"]
    lines = {
        "parameters": f"{params['total']:,} ({params['active']:,} active)",
        "training": f"{result['tokens']:,} tokens in {result['seconds']:.0f} s, "
        f"{result['tokens_per_second']:,.0f} tokens/s",
        "validation perplexity": perplexity,
        "next-token accuracy": f"{validation['accuracy']:.1%} of {validation['tokens']:,} tokens "
        f"({validation['coverage']:.1%} of the split)",
    }
    if experts is not None:
        lines["dead experts"] = (
            f"{experts['dead']} ({experts['dead_fraction']:.1%}) over the last "
            f"{experts['window_tokens']:,} training tokens"
        )
    lines["figures and samples"] = f"{run}/figures, {run}/samples.txt"
    lines["everything"] = f"{run}/summary.json"
    print(f"\n{result['recipe']}, {result['steps']:,} steps")
    for name, text in lines.items():
        print(f"  {name:<24} {text}")


if __name__ == "__main__":
    sys.exit(main())
