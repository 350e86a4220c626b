"""Compile the kernels ahead of their use, also for GPUs of other machines, and report their registers.

Without --archs the library is the one that would be compiled on first use. It goes to the user's cache,
where every installation of these sources finds it.
"""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sra_ds import cli
from sra_ds.errors import BackendUnavailable
from sra_ds.files import user_cache
from sra_ds.ops.extension import KERNELS
from sra_ds.ops.kernel_build import EVERYWHERE, BuildError, asked_for, build, install
from sra_ds.ops.kernel_report import kernel_reports


def main() -> int:
    """Parse and run."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--archs", help=f'compute capabilities, "{EVERYWHERE}"')
    parser.add_argument(
        "--out", type=Path, help="folder of the library (default: the user's cache)"
    )
    return cli.run(parser.parse_args(), command, show)


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build, and read what the compiler said."""
    started = time.monotonic()
    with TemporaryDirectory() as scratch:
        try:
            archs, reason = asked_for(arguments.archs)
            library = build(Path(scratch), archs)
            kernels = kernel_reports(Path(scratch)) if archs else []
        except BuildError as error:
            raise BackendUnavailable(str(error)) from None
        target = (arguments.out or user_cache(KERNELS)) / library.name
        install(library, target)
    return {
        "library": str(target),
        "not_for_gpus": reason,
        "megabytes": round(target.stat().st_size / 1e6, 1),
        "seconds": round(time.monotonic() - started, 1),
        "kernels": [kernel._asdict() for kernel in kernels],
    }


def show(result: dict[str, Any]) -> None:
    """A line for each kernel."""
    print(f"{result['library']}: {result['megabytes']} MB in {result['seconds']} s")
    if result["not_for_gpus"]:
        print(f"not for GPUs: {result['not_for_gpus']}")
    by_kernel: dict[str, list[str]] = {}
    for kernel in result["kernels"]:
        spilled = f" ({kernel['spilled']} bytes spilled)" if kernel["spilled"] else ""
        found = f"{kernel['registers']:3} on sm_{kernel['arch']}{spilled}"
        by_kernel.setdefault(kernel["kernel"], []).append(found)
    for name, found in by_kernel.items():
        print(f"{name:64} registers: {', '.join(found)}")


if __name__ == "__main__":
    sys.exit(main())
