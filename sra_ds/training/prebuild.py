"""Compile DeepSpeed's shared-memory op ahead of the first run: python -m sra_ds.training.prebuild"""

import sys

from sra_ds.errors import SraError
from sra_ds.training.environment import prepare_process


def main() -> int:
    """Build it if this machine trains on the CPU."""
    try:
        prepare_process()
    except SraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    from deepspeed.accelerator import get_accelerator  # after the environment is prepared

    if get_accelerator().device_name() != "cpu":
        return 0
    print("compiling DeepSpeed's shared-memory op (about 90 s, once; do not interrupt)", flush=True)
    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
