"""The language model: embedding -> blocks[mixer, channel (+ memory)] -> head, each a closed choice by
`kind`."""

from pydantic import Field, model_validator

from sra_ds.config.base import Part
from sra_ds.config.model.channels import (
    ChannelConfig,
    DenseChannelConfig,
    FeedForwardConfig,
    GeluConfig,
    GhostsConfig,
    MoEChannelConfig,
    PrimeMaskedChannelConfig,
    SwigluConfig,
)
from sra_ds.config.model.couplings import (
    CouplingConfig,
    GraphCouplingConfig,
    HypergraphCouplingConfig,
    NoCouplingConfig,
)
from sra_ds.config.model.embeddings import (
    EmbeddingConfig,
    FactorisedEmbeddingConfig,
    HarmonicsConfig,
    HybridEmbeddingConfig,
    PrimeHilbertEmbeddingConfig,
    SpectralEmbeddingConfig,
    TokenEmbeddingConfig,
)
from sra_ds.config.model.heads import HeadConfig, PreManifestHeadConfig, TiedHeadConfig
from sra_ds.config.model.memory import (
    FastMemoryConfig,
    FastWeightsConfig,
    MemoryConfig,
    NoMemoryConfig,
    PersistentMemoryConfig,
    StaticMemoryConfig,
)
from sra_ds.config.model.mixers import (
    AttentionConfig,
    ConvolutionConfig,
    HeadsConfig,
    MixerConfig,
    ResonanceConfig,
    WaveAttentionConfig,
    WaveConvConfig,
    WaveletsConfig,
)
from sra_ds.config.model.routers import (
    AnyRouterConfig,
    CosineRouterConfig,
    GateForm,
    HashRouterConfig,
    LinearRouterConfig,
    RandomRouterConfig,
    RouterConfig,
)

__all__ = [
    "AnyRouterConfig",
    "AttentionConfig",
    "ChannelConfig",
    "ConvolutionConfig",
    "CosineRouterConfig",
    "CouplingConfig",
    "DenseChannelConfig",
    "EmbeddingConfig",
    "FactorisedEmbeddingConfig",
    "FastMemoryConfig",
    "FastWeightsConfig",
    "FeedForwardConfig",
    "GateForm",
    "GeluConfig",
    "GhostsConfig",
    "GraphCouplingConfig",
    "HarmonicsConfig",
    "HashRouterConfig",
    "HeadConfig",
    "HeadsConfig",
    "HybridEmbeddingConfig",
    "HypergraphCouplingConfig",
    "LinearRouterConfig",
    "MemoryConfig",
    "MixerConfig",
    "MoEChannelConfig",
    "ModelConfig",
    "NoCouplingConfig",
    "NoMemoryConfig",
    "PersistentMemoryConfig",
    "PreManifestHeadConfig",
    "PrimeHilbertEmbeddingConfig",
    "PrimeMaskedChannelConfig",
    "RandomRouterConfig",
    "ResonanceConfig",
    "RouterConfig",
    "SpectralEmbeddingConfig",
    "StaticMemoryConfig",
    "SwigluConfig",
    "TiedHeadConfig",
    "TokenEmbeddingConfig",
    "WaveAttentionConfig",
    "WaveConvConfig",
    "WaveletsConfig",
]


class ModelConfig(Part):
    """A pre-LN decoder. The vocabulary size belongs to `data.tokenizer`."""

    width: int = Field(512, ge=1)
    """Residual width D."""
    layers: int = Field(4, ge=1)
    embedding: EmbeddingConfig = TokenEmbeddingConfig()
    mixer: MixerConfig = AttentionConfig()
    channel: ChannelConfig
    memory: MemoryConfig = NoMemoryConfig()
    head: HeadConfig = TiedHeadConfig()
    document_boundaries: bool = True
    """Tokens see their own document only, whatever the mixer."""

    @model_validator(mode="after")
    def _waves_fit(self) -> "ModelConfig":
        waves = self.embedding
        if isinstance(waves, HarmonicsConfig) and waves.harmonics > (most := self.width // 2 - 1):
            raise ValueError(
                f"embedding.harmonics={waves.harmonics}: width={self.width} has room for at most {most} "
                "waves (width / 2 - 1)"
            )
        return self

    @model_validator(mode="after")
    def _whole_heads(self) -> "ModelConfig":
        mixer = self.mixer
        if isinstance(mixer, HeadsConfig) and self.width % (2 * mixer.heads):
            raise ValueError(
                f"width={self.width} must be a multiple of 2 x mixer.heads={2 * mixer.heads}"
            )
        if isinstance(self.channel, MoEChannelConfig):
            for name, size in (
                ("width", self.width),
                ("expert.hidden", self.channel.expert.hidden),
            ):
                if size % 8:
                    raise ValueError(f"{name}={size} must be a multiple of 8 for grouped products")
            heads = self.channel.expert_heads
            if self.channel.expert_kind == "block" and self.width % (2 * heads):
                raise ValueError(
                    f"width={self.width} must be a multiple of 2 x channel.expert_heads={2 * heads}"
                )
        return self
