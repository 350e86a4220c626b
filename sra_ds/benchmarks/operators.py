"""What the benchmarks of operators share: number formats, names of sizes, oneDNN's cache."""

import os
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16)


def label(size: Any, dtype: torch.dtype, what: str) -> str:
    """A NamedTuple of sizes in words, as `8192 tokens, bfloat16, forward`."""
    sizes = " ".join(f"{value} {name}" for name, value in size._asdict().items())
    return f"{sizes}, {str(dtype).removeprefix('torch.')}, {what}"


def keep_compiled_products() -> None:
    """Or variants, which take turns, would throw each other's compiled products out of oneDNN's cache."""
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "16384"
