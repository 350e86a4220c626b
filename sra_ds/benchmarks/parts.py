"""Parts of a block against the plain ones they stand for, in turn in one process.

    mixer      attention; resonance of 3 iterations, halting softly, and hard at no and at every token
    bands      attention; gated bands of wavelets, attention on bands, a plain convolution as wide
    channel    a dense feed-forward network; the same sparse, as whole matrices and in blocks

Forward alone (without gradient) and with the backward pass, in float32, on windows of several documents;
bands on long windows of one document, where attention is at its fastest. Times are medians over rounds;
what counts are ratios within a run.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sra_ds.config.model import (
    AttentionConfig,
    ConvolutionConfig,
    DenseChannelConfig,
    GeluConfig,
    PrimeMaskedChannelConfig,
    ResonanceConfig,
    WaveAttentionConfig,
    WaveConvConfig,
)
from sra_ds.heap import keep_freed_memory
from sra_ds.model.channels.dense import DenseChannel
from sra_ds.model.channels.prime_masked import PrimeMaskedChannel
from sra_ds.model.context import Context, document_positions, visible_positions
from sra_ds.model.init import initialise
from sra_ds.model.mixers.attention import Attention
from sra_ds.model.mixers.convolution import Convolution
from sra_ds.model.mixers.resonance import Resonance
from sra_ds.model.mixers.wave_attention import WaveAttention
from sra_ds.model.mixers.wave_conv import WaveConv
from sra_ds.timing import Work, in_turn, medians

WINDOWS, LENGTH = 16, 256
MIXER_WIDTH, HEADS = 256, 4
LONG = ((4, 1024), (1, 4096))
"""Windows and their length, for bands."""
CHANNEL_WIDTHS = ((256, 1024), (768, 3072))
DOCUMENT = 1 / 64
"""Chance that a token opens a document."""


def bench_parts(what: str, rounds: int) -> dict[str, Any]:
    """`mixer`, `bands` or `channel`."""
    keep_freed_memory()
    if what == "bands":
        return {
            f"B{windows} T{length} D{MIXER_WIDTH}": compare(
                bands(), MIXER_WIDTH, "attention", rounds, one_document(windows, length)
            )
            for windows, length in LONG
        }
    context = batch_context()
    if what == "mixer":
        size = f"B{WINDOWS} T{LENGTH} D{MIXER_WIDTH} H{HEADS}"
        return {size: compare(mixers(), MIXER_WIDTH, "attention", rounds, context)}
    return {
        f"B{WINDOWS} T{LENGTH} D{width} F{hidden}": compare(
            channels(width, hidden), width, "dense", rounds, context
        )
        for width, hidden in CHANNEL_WIDTHS
    }


def bands() -> dict[str, nn.Module]:
    """Attention beside mixers with filters of db4, three levels."""
    width = MIXER_WIDTH
    return {
        "attention": Attention(AttentionConfig(heads=HEADS, dropout=0.0), width),
        "wave_conv": WaveConv(WaveConvConfig(filters="learnable"), width),
        "wave_attn": WaveAttention(
            WaveAttentionConfig(heads=HEADS, filters="learnable", dropout=0.0), width
        ),
        "convolution": Convolution(ConvolutionConfig(taps=50), width),
    }


def mixers() -> dict[str, nn.Module]:
    """Attention and resonance at their initial weights, which halt nowhere by themselves."""
    made: dict[str, nn.Module] = {
        "attention": Attention(AttentionConfig(heads=HEADS, dropout=0.0), MIXER_WIDTH)
    }
    for name, halting, threshold in (
        ("soft", "soft", 0.3),
        ("hard, all go on", "hard", 0.0),
        ("hard, all stop", "hard", 2.0),
    ):
        mixer = Resonance(ResonanceConfig(heads=HEADS, halting=halting), MIXER_WIDTH)
        mixer.threshold = threshold  # beyond 1 no entropy goes on
        made[name] = mixer
    return made


def channels(width: int, hidden: int) -> dict[str, nn.Module]:
    """One network, dense and sparse."""
    network = GeluConfig(hidden=hidden, dropout=0.0)
    sparse = {
        storage: PrimeMaskedChannel(
            PrimeMaskedChannelConfig(feed_forward=network, storage=storage),
            width,
        )
        for storage in ("masked", "blocks")
    }
    return {"dense": DenseChannel(DenseChannelConfig(feed_forward=network), width), **sparse}


def compare(
    parts: dict[str, nn.Module], width: int, plain: str, rounds: int, context: Context
) -> dict[str, Any]:
    """Milliseconds of each part and its ratio to the plain one, forwards and with backward."""
    for part in parts.values():
        holder = nn.Module()
        holder.blocks = nn.ModuleList([part])
        initialise(holder, 0)
    x_BTD = torch.randn(*context.ids_BT.shape, width, requires_grad=True)
    grad_BTD = torch.randn_like(x_BTD)
    found = {}
    for direction, backward in (("forward", False), ("with backward", True)):
        works = {n: work(part, x_BTD, context, grad_BTD, backward) for n, part in parts.items()}
        times = medians(in_turn(works, rounds))
        ratios = {name: times[name] / times[plain] for name in parts}
        found[direction] = {"milliseconds": times, f"over_{plain}": ratios}
    return found


def work(
    part: nn.Module, x_BTD: Tensor, context: Context, grad_BTD: Tensor, backward: bool
) -> Work:
    """One pass through a part."""

    def pass_once() -> None:
        with torch.set_grad_enabled(backward):
            y_BTD, _ = part(x_BTD, context)
        if backward:
            y_BTD.backward(grad_BTD)
            part.zero_grad()

    return pass_once


def batch_context() -> Context:
    """Windows of several documents each, as training has them."""
    ids_BT = torch.zeros(WINDOWS, LENGTH, dtype=torch.int64)
    documents_BT = (torch.rand(WINDOWS, LENGTH) < DOCUMENT).cumsum(-1)
    visible = visible_positions(documents_BT, None, LENGTH, LENGTH, ids_BT.device)
    every = torch.ones_like(ids_BT, dtype=torch.bool)
    positions_BT = document_positions(documents_BT, every)
    return Context(ids_BT, torch.arange(LENGTH), positions_BT, None, visible)


def one_document(windows: int, length: int) -> Context:
    """Windows that one document fills."""
    ids_BT = torch.zeros(windows, length, dtype=torch.int64)
    positions_T = torch.arange(length)
    return Context(ids_BT, positions_T, positions_T.expand(windows, -1), None, None)
