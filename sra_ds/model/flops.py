"""Training FLOPs a token needs, forwards and backwards.

6 per active parameter, and what parts do besides, or use more or less than once. T tokens of a window, D
width; of causal attention half of the T x T products count. A ghost that learns in the background is left
out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from sra_ds.config.model import MoEChannelConfig
from sra_ds.model.channels.dense import DenseChannel
from sra_ds.model.channels.moe import MoEChannel
from sra_ds.model.channels.prime_masked import PrimeMaskedChannel
from sra_ds.model.counting import count_parameters
from sra_ds.model.embeddings.factorised import FactorisedEmbedding
from sra_ds.model.embeddings.prime_hilbert import PrimeHilbertEmbedding
from sra_ds.model.embeddings.spectral import Waves
from sra_ds.model.embeddings.token import TokenEmbedding
from sra_ds.model.expert_blocks import StackedBlocks
from sra_ds.model.heads.pre_manifest import PreManifestHead
from sra_ds.model.heads.tied import TiedHead
from sra_ds.model.language_model import LanguageModel
from sra_ds.model.memories.fast import FastMemory
from sra_ds.model.memories.static import StaticMemory
from sra_ds.model.mixers.attention import Attention
from sra_ds.model.mixers.convolution import Convolution
from sra_ds.model.mixers.resonance import Resonance
from sra_ds.model.mixers.wave_attention import WaveAttention, stride
from sra_ds.model.mixers.wave_conv import WaveConv
from sra_ds.moe.coupling import Coupling


class Sizes(NamedTuple):
    """What a part's own work depends on. `attention`: of one layer's; `top_k`: experts of a token."""

    width: int
    vocab_size: int
    top_k: int
    attention: float


def flops_per_token(model: LanguageModel, sequence_length: int, top_k: int | None = None) -> float:
    """Of a window of `sequence_length` tokens, each with `top_k` experts: none given, as many as at the
    end of training. The model is a whole one, not one whose parameters are spread over processes."""
    channel, width = model.config.channel, model.config.width
    if top_k is None:
        top_k = channel.top_k if isinstance(channel, MoEChannelConfig) else 1
    sizes = Sizes(width, model.vocab_size, top_k, 6 * sequence_length * width)
    total = 6 * float(count_parameters(model, top_k)["active_with_anchors"])
    for module in model.modules():
        for kind, own in OWN_WORK.items():
            if isinstance(module, kind):
                total += own(module, sizes)
    return total


def _attention(module: Attention, sizes: Sizes) -> float:
    del module
    return sizes.attention


def _resonance(module: Resonance, sizes: Sizes) -> float:
    """Attention in every iteration, the retrieval map in every one but the last."""
    total = sizes.attention * module.iterations
    if module.iterations > 1:
        total += 6 * (module.iterations - 2) * module.retrieval_weight.numel()
    return total


def _wave_attention(module: WaveAttention, sizes: Sizes) -> float:
    """Attention to the keys each band keeps; at each level the filter of the bands that are left."""
    levels, bands = module.levels, module.levels + 1
    kept = sum(1 / stride(band, levels) for band in range(bands)) / bands
    filtered = sum(2 * (bands - level) / bands for level in range(levels))
    return sizes.attention * kept + 6 * module.low_pass.length * filtered * sizes.width


def _wave_conv(module: WaveConv, sizes: Sizes) -> float:
    return 6 * module.low_pass.length * module.levels * sizes.width


def _waves(module: Waves, sizes: Sizes) -> float:
    """The waves, which are no parameters or few, in the embedding and in the head; those that are given
    get no gradient."""
    passes = 4 if module.frequency_shift_H is None else 6
    return 2 * passes * 2 * module.harmonics * sizes.width


def _expert_blocks(module: StackedBlocks, sizes: Sizes) -> float:
    return sizes.attention * len(module.expert_ids)


def _coupling(module: Coupling, sizes: Sizes) -> float:
    """Its maps once for each of a token's experts."""
    return 6 * (sizes.top_k - 1) * sum(map_.numel() for map_ in module.maps())


def _static_memory(module: StaticMemory, sizes: Sizes) -> float:
    """Less the slots that a token does not read."""
    del sizes
    return -6 * (module.config.slots - module.config.best) * module.config.value_width


def _fast_memory(module: FastMemory, sizes: Sizes) -> float:
    """S k, the write, S q: of weights that are no parameters."""
    del sizes
    return 6 * 3 * module.config.heads * module.config.head_width**2


def _pre_manifest(module: PreManifestHead, sizes: Sizes) -> float:
    """The table once more for each refinement, without a gradient."""
    return 2 * module.config.steps * sizes.vocab_size * module.table_width


PARAMETERS_ALONE: tuple[type[nn.Module], ...] = (
    TokenEmbedding, PrimeHilbertEmbedding, FactorisedEmbedding,
    Convolution, DenseChannel, MoEChannel, PrimeMaskedChannel, TiedHead,
)  # fmt: skip


def _none(module: nn.Module, sizes: Sizes) -> float:
    """Its active parameters are all there is."""
    del module, sizes
    return 0.0


OWN_WORK: dict[type[nn.Module], Callable[[Any, Sizes], float]] = {
    **dict.fromkeys(PARAMETERS_ALONE, _none),
    Attention: _attention,
    Resonance: _resonance,
    WaveAttention: _wave_attention,
    WaveConv: _wave_conv,
    Waves: _waves,
    StackedBlocks: _expert_blocks,
    Coupling: _coupling,
    StaticMemory: _static_memory,
    FastMemory: _fast_memory,
    PreManifestHead: _pre_manifest,
}
