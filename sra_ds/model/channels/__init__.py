"""Channels: x_BTD, context -> (y_BTD, facts), each token on its own."""

from typing import Any

from torch import nn

from sra_ds.config.model import DenseChannelConfig, MoEChannelConfig, PrimeMaskedChannelConfig
from sra_ds.model.channels.dense import DenseChannel
from sra_ds.model.channels.moe import MoEChannel
from sra_ds.model.channels.prime_masked import PrimeMaskedChannel

CHANNELS: dict[type[Any], type[nn.Module]] = {
    DenseChannelConfig: DenseChannel,
    MoEChannelConfig: MoEChannel,
    PrimeMaskedChannelConfig: PrimeMaskedChannel,
}
