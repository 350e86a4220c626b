"""Write a run's model as a folder that transformers opens, offline and without sra_ds:

    AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)
    AutoTokenizer.from_pretrained(OUT)

The folder holds the weights (float32, safetensors), the tokenizer, and the model in plain torch.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sra_ds import cli
from sra_ds.inference.hf.export import export_hf
from sra_ds.inference.load import load_run


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    return cli.run(parser.parse_args(), command, cli.show_tree)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Export; returns what was written."""
    return export_hf(load_run(arguments.run, arguments.checkpoint), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
