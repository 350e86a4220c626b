"""Prepare a recipe's corpus: tokenizer and token shards, once; runs then start at once and offline."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.config import load_recipe
from sra_ds.data.prepare import prepare


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    cli.add_recipe(parser)
    parser.add_argument("--out", type=Path, help="folder of prepared corpora (data.directory)")
    return cli.run(parser.parse_intermixed_args(), command, cli.show_tree)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepare or verify; the counts of every split."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    data = recipe.data
    if arguments.out is not None:
        data = data.model_copy(update={"directory": arguments.out})
    corpus = prepare(data)
    counted = ("tokens", "words", "bytes")
    return {
        "folder": str(corpus.folder),
        "fingerprint": corpus.fingerprint,
        "tokenizer_entries": corpus.manifest["tokenizer"]["entries"],
        "domains": corpus.domains,
        "splits": {
            name: {"documents": entry["documents"]["count"], **{key: entry[key] for key in counted}}
            for name, entry in corpus.manifest["splits"].items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
