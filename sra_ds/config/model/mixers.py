"""Mixers: the only parts where tokens meet."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sra_ds.config.base import Part, by_name


class HeadsConfig(Part):
    """What mixers with attention heads share."""

    heads: int = Field(8, ge=1)
    rope_theta: float | None = Field(10_000.0, gt=0)
    """Base of the rotary wavelengths; null: queries and keys are not rotated, and only the embedding may
    know of positions."""


class AttentionConfig(HeadsConfig):
    """Causal multi-head attention with rotary positions."""

    kind: Literal["attention"] = "attention"
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the attention weights."""


class ResonanceConfig(HeadsConfig):
    """Attention that refines its query with what it found, until the weights are sharp enough."""

    kind: Literal["resonance"] = "resonance"
    iterations: int = Field(3, ge=1)
    """Largest number of iterations T_max; 1 is attention without dropout."""
    halting: Literal["soft", "hard"] = "soft"
    """`soft`: a weighted mean over the iterations. `hard`: each token stops at the first iteration whose
    entropy is below `threshold`; queries that go on are gathered."""
    threshold: float = Field(0.3, ge=0, le=1)
    """Entropy of the weights over ln(visible positions), mean over heads, below which a token stops."""
    softness: float = Field(0.05, gt=0)
    """Width of the soft threshold, in the same unit."""
    kernel: Literal["flex", "chunked"] = "flex"
    """What computes whole windows on a GPU: torch's flex attention, a fused kernel, or a part of the
    queries at a time, as everywhere else."""


class ConvolutionConfig(Part):
    """A gated causal convolution with free filters, one per channel."""

    kind: Literal["convolution"] = "convolution"
    taps: int = Field(50, ge=1)
    """Positions a filter sees, its own among them."""


WaveletFamily = Literal[
    "haar", "db2", "db3", "db4", "db6", "db8", "sym4", "sym6", "sym8", "coif1", "coif2", "dmey"
]
TAPS: dict[str, int] = {
    "haar": 2, "db2": 4, "db3": 6, "db4": 8, "db6": 12, "db8": 16, "sym4": 8, "sym6": 12, "sym8": 16,
    "coif1": 6, "coif2": 12, "dmey": 62,
}  # fmt: skip
"""Length of the low-pass filter of each family."""


class WaveletsConfig(Part):
    """What mixers made of wavelets share: a causal transform without decimation, whose bands add up to
    its input again."""

    kind: Literal["wavelet"] = "wavelet"
    families: tuple[WaveletFamily, ...] = Field(("db4",), min_length=1)
    """Where the low-pass filter of each layer comes from; of several, each layer learns which to take."""
    levels: int = Field(3, ge=1)
    """Times the low-pass filter is applied, twice as wide each time; there are levels + 1 bands."""
    filters: Literal["fixed", "learnable"] = "fixed"
    """Keep the family's filter, or train it, held near orthogonality by `losses.wavelet_weight`."""
    choice_temperature: tuple[float, float] = (1.0, 0.3)
    """Of the draw among several families, at the first step and at the last."""

    @property
    def receptive_field(self) -> int:
        """Positions that the coarsest band sees, its own among them."""
        longest = max(TAPS[family] for family in self.families)
        return 1 + (longest - 1) * ((1 << self.levels) - 1)

    @model_validator(mode="after")
    def _choices_make_sense(self) -> "WaveletsConfig":
        if len(set(self.families)) < len(self.families):
            raise ValueError(f"families={list(self.families)} names one more than once")
        if len(self.families) > 1 and self.filters == "learnable":
            raise ValueError(
                "filters=learnable needs one family: where several are drawn from, those not drawn "
                "would not learn"
            )
        temperature = WaveletsConfig.model_fields["choice_temperature"].default
        if len(self.families) == 1 and self.choice_temperature != temperature:
            raise ValueError("choice_temperature has no effect with one family")
        if min(self.choice_temperature) <= 0:
            raise ValueError(f"choice_temperature={self.choice_temperature} must be positive")
        return self


class WaveConvConfig(WaveletsConfig):
    """Bands of the input, each channel of each weighted by a gate that its position sets."""

    form: Literal["wave_conv"] = "wave_conv"


class WaveAttentionConfig(WaveletsConfig, HeadsConfig):
    """Causal attention in which each group of heads sees the keys and values of one band; of coarse
    bands every 2^j-th position of a document."""

    form: Literal["wave_attn"] = "wave_attn"
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the attention weights."""

    @model_validator(mode="after")
    def _a_band_for_every_group(self) -> "WaveAttentionConfig":
        bands = self.levels + 1
        if self.heads % bands:
            raise ValueError(
                f"heads={self.heads} must be a multiple of levels + 1 = {bands}: each band has as many"
            )
        return self


WaveletConfig = Annotated[
    WaveConvConfig | WaveAttentionConfig,
    Field(discriminator="form"),
    by_name("form", "wave_attn"),
]
MixerConfig = Annotated[
    AttentionConfig | ResonanceConfig | ConvolutionConfig | WaveletConfig,
    Field(discriminator="kind"),
    by_name("kind", "attention"),
]
