"""The low-pass filter of a wavelet transform: a family's, a learned one, or a learned choice of families.

Taps are h = dec_lo / sum(dec_lo) of PyWavelets, so that they sum to 1; whatever training does, the sum is
brought back to 1. How far learned taps are from those of an orthogonal wavelet is

    sum_m (2 sum_k h_k h_{k+2m} - delta_m)^2

Of several families a layer takes one, drawn in training from softmax(logits + Gumbel noise) with the
gradient of the soft weights (straight-through; Jang et al. 2017, arXiv 1611.01144), and the likeliest
otherwise. Letters: F families, K taps of the longest.
"""

import pywt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import WaveletsConfig
from sra_ds.model.facts import Facts
from sra_ds.ops.precision import at_least_float32


class LowPass(nn.Module):
    """-> (taps_K that sum to 1, facts)."""

    taps_FK: Tensor
    temperature: Tensor

    def __init__(self, config: WaveletsConfig) -> None:
        super().__init__()
        self.families, self.first_temperature = config.families, config.choice_temperature[0]
        self.length = max(len(wavelet_taps(family)) for family in config.families)
        self.register_buffer("taps_FK", torch.empty(len(config.families), self.length), False)
        self.learned_K: nn.Parameter | None = None
        if config.filters == "learnable":
            self.learned_K = nn.Parameter(torch.empty(self.length))
        self.choice_F: nn.Parameter | None = None
        if len(config.families) > 1:
            self.choice_F = nn.Parameter(torch.empty(len(config.families)))
            self.register_buffer("temperature", torch.empty(()))

    def forward(self) -> tuple[Tensor, Facts]:
        """In float32 at least. Facts: how far from where it started, the chance of each family."""
        facts: Facts = {}
        if self.learned_K is not None:
            taps_K, first_K = at_least_float32(self.learned_K), self.taps_FK[0]
            facts["filter_drift"] = ((taps_K.detach() - first_K).norm() / first_K.norm()).float()
        elif self.choice_F is not None:
            logits_F = at_least_float32(self.choice_F)
            taps_K = self._weights(logits_F) @ at_least_float32(self.taps_FK)
            for family, chance in zip(self.families, logits_F.detach().softmax(0), strict=True):
                facts[f"choice_{family}"] = chance
        else:
            taps_K = at_least_float32(self.taps_FK[0])
        return taps_K + (1 - taps_K.sum()) / len(taps_K), facts

    def _weights(self, logits_F: Tensor) -> Tensor:
        """Of the families: one is taken whole."""
        if not self.training:
            return F.one_hot(logits_F.argmax(), len(logits_F)).to(logits_F.dtype)
        noise_F = -torch.empty_like(logits_F).exponential_().log()
        soft_F = ((logits_F + noise_F) / self.temperature.to(logits_F.dtype)).softmax(0)
        hard_F = F.one_hot(soft_F.argmax(), len(soft_F)).to(soft_F.dtype)
        return hard_F + soft_F - soft_F.detach()


def wavelet_taps(family: str) -> Tensor:
    """The decomposition low-pass of a family over its sum, in float64."""
    with torch.device("cpu"):
        taps_K = torch.tensor(pywt.Wavelet(family).dec_lo, dtype=torch.float64)
    return taps_K / taps_K.sum()


def orthogonality_error(taps_K: Tensor) -> Tensor:
    """0 where taps that sum to 1 and their even shifts are orthogonal, as those of wavelets are."""
    error = (2 * taps_K.square().sum() - 1).square()
    for shift in range(2, len(taps_K), 2):
        error = error + (2 * taps_K[shift:] @ taps_K[:-shift]).square()
    return error
