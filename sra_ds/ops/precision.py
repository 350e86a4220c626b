"""Where rounding matters, compute in float32 at least; float64 stays, so that tests can be exact."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 become float32; float32 and float64 pass."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def widened(x: Tensor) -> Tensor:
    """In the widest type of its device."""
    return x.to(widest(x.device))


def widest(device: torch.device | None = None) -> torch.dtype:
    """float64, or float32 on a device that has none (mps)."""
    return torch.float32 if device is not None and device.type == "mps" else torch.float64
