"""Where rounding matters, compute in float32 at least; float64 stays, so that tests can be exact."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 become float32; float32 and float64 pass."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
