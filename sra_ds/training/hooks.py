"""Looking into a running model: hooks that compiled blocks do not hide, and that are gone afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sra_ds.data.loader import Batch


@contextmanager
def hooked(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """The hooks behind `handles` see every forward pass within, and are removed at its end."""
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks do not see new hooks
            yield
    finally:
        for handle in handles:
            handle.remove()


def of_valid_tokens(
    kept: list[Tensor], handles: Sequence[RemovableHandle], forward: nn.Module, batch: Batch
) -> list[Tensor]:
    """What the hooks behind `handles` put into `kept` in a forward pass without dropout or noise, its
    first dimension cut to the valid tokens. Collective."""
    training = forward.training
    forward.eval()
    with hooked(handles):
        forward(*batch)
    forward.train(training)
    valid = slice(None) if batch.valid_BT is None else batch.valid_BT.flatten()
    return [x[valid] for x in kept]
