"""Heads: h_ND -> logits_NV, or with targets the summed loss in chunks."""

from typing import Any

from torch import nn

from sra_ds.config.model import PreManifestHeadConfig, TiedHeadConfig
from sra_ds.model.heads.pre_manifest import PreManifestHead
from sra_ds.model.heads.tied import TiedHead

HEADS: dict[type[Any], type[nn.Module]] = {
    TiedHeadConfig: TiedHead,
    PreManifestHeadConfig: PreManifestHead,
}
