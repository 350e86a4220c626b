"""Numbers per token that mixers with filters keep for their backward pass.

Counted as those of `sra_ds.planning.activations`. D width, J levels, T tokens of a window.
"""

from sra_ds.config.model import ConvolutionConfig, WaveAttentionConfig, WaveConvConfig
from sra_ds.model.mixers.wave_attention import stride


def filtered_numbers(
    mixer: ConvolutionConfig | WaveConvConfig | WaveAttentionConfig, width: int, length: int
) -> float:
    """Convolution: its input, the gates, what is found, their product. Gated bands: the input of every
    level, gates, bands, their sum. Attention on bands: the input, queries before and after rotation, keys
    and values of every level, whole and as they are attended to, and the outputs."""
    if isinstance(mixer, ConvolutionConfig):
        return 4 * width
    levels = mixer.levels
    if isinstance(mixer, WaveConvConfig):
        return 3 * (levels + 1) * width
    bands = levels + 1
    filtered = sum(2 * width * (bands - level) / bands for level in range(levels))
    kept = sum(1 / stride(band, levels) for band in range(bands))
    attended = 2 * width * kept / bands
    return (6 + 2) * width + filtered + attended + kept * length
