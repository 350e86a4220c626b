"""What mixers that look back a fixed way need of the context and of decoding."""

from torch import Tensor, cat

from sra_ds.model.context import Context
from sra_ds.ops.precision import at_least_float32

Cache = dict[str, Tensor] | None
"""What a mixer keeps between steps of decoding."""


def filterable(x_BTD: Tensor, context: Context) -> Tensor:
    """x in float32 at least, zero at padding. Padding may stand before and after a document, not within:
    how far a position may look back is counted in real tokens."""
    x_BTD = at_least_float32(x_BTD)
    if context.valid_BT is None:
        return x_BTD
    return x_BTD.masked_fill(~context.valid_BT.unsqueeze(-1), 0.0)


def with_past(cache: Cache, name: str, x_BTD: Tensor, keep: int) -> Tensor:
    """x after what the cache holds under `name`, which becomes the last `keep` positions of both."""
    if cache is None:
        return x_BTD
    joined_BSD = cat([cache[name], x_BTD], 1) if name in cache else x_BTD
    cache[name] = joined_BSD[:, max(0, joined_BSD.shape[1] - keep) :]
    return joined_BSD
