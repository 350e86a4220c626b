"""Mixers: x_BTD, context -> (y_BTD, facts), causal; the only parts where tokens meet."""

from typing import Any

from torch import nn

from sra_ds.config.model import (
    AttentionConfig,
    ConvolutionConfig,
    ResonanceConfig,
    WaveAttentionConfig,
    WaveConvConfig,
)
from sra_ds.model.mixers.attention import Attention
from sra_ds.model.mixers.convolution import Convolution
from sra_ds.model.mixers.resonance import Resonance
from sra_ds.model.mixers.wave_attention import WaveAttention
from sra_ds.model.mixers.wave_conv import WaveConv

MIXERS: dict[type[Any], type[nn.Module]] = {
    AttentionConfig: Attention,
    ResonanceConfig: Resonance,
    ConvolutionConfig: Convolution,
    WaveConvConfig: WaveConv,
    WaveAttentionConfig: WaveAttention,
}
