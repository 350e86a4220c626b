"""Bytes that routed layers keep where they look at the output of every route.

Counted as those of `sra_ds.planning.activations`; w are the bytes of a number in the model's precision.
"""

from sra_ds.config.model import (
    GraphCouplingConfig,
    HypergraphCouplingConfig,
    MoEChannelConfig,
)

FLOAT, INTEGER = 4, 8


def opened_bytes(
    channel: MoEChannelConfig, width: int, w: int, hidden: float, visible: int
) -> float:
    """Per token, beyond what a closed layer keeps. `hidden` are the bytes a network by itself keeps of a
    row, `visible` the entries of a mask for each token."""
    if not channel.opened:
        return 0
    total = float(_coupling(channel, width, w))
    if w < FLOAT:  # outputs and their sum are weighed in float32
        total += channel.top_k * width * FLOAT
    if channel.compare_outputs:  # outputs less their mean, and those of length 1
        total += channel.top_k * (2 * width + channel.top_k) * FLOAT
    if channel.ghosts.count and channel.ghosts.background:  # the next ghost, and its error
        total += hidden + width * FLOAT + INTEGER
    if channel.expert_kind == "block":
        # of each expert: q, k, v, what attention gives (twice), the norm's input and output, its own
        # output gathered; and the mask of documents as numbers
        total += (8 * channel.experts * width + visible) * w
    return total


def _coupling(channel: MoEChannelConfig, width: int, w: int) -> float:
    """Of every round: what is heard before its activation, the result, messages, how much is heard
    of whom."""
    coupling, top_k = channel.coupling, channel.top_k
    if isinstance(coupling, GraphCouplingConfig):
        pairs = 3 * top_k * FLOAT + 2 * top_k
        return coupling.rounds * top_k * (2 * width * w + 2 * coupling.rank * w + pairs)
    if isinstance(coupling, HypergraphCouplingConfig):
        count = len(coupling.sets(channel.experts)) or coupling.hyperedges
        members = (4 if coupling.token_gate else 3) * count * FLOAT
        return coupling.rounds * top_k * (2 * width * w + 2 * coupling.rank * w + members)
    return 0
