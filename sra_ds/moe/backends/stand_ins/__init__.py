"""Plain-torch stand-ins for the two compiled packages MegaBlocks imports.

Both have to be built with nvcc for one torch, and neither builds with current ones. What MegaBlocks asks
of them is little: sorting, counting and running sums of expert ids, and grouped products. Each module
here has the name, the functions and the arguments of the package it stands in for.
"""

import sys
from importlib import import_module

STAND_INS = ("megablocks_ops", "grouped_gemm")


def provide_missing() -> None:
    """Make those of the packages that are not installed importable; an installed one is left alone, and
    its ImportError, where it does not load, is the caller's."""
    for name in STAND_INS:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            sys.modules[name] = import_module(f"{__name__}.{name}")
