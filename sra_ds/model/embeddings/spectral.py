"""Tokens as sums of waves along the residual width, alone or mixed with a table of token vectors.

    x[d] = sum_h a_h sin(2 pi f_h d/D + phi_h) = c B,     c = [a cos phi, a sin phi]

B holds the sines and cosines, 2H x D: a factorised embedding whose map is given, of rank 2H at most.
Frequencies start as whole numbers f_h = h floor((D/2 - 1) / H) below D/2 (at D/2 the sine is zero
everywhere), and rows are scaled by sqrt(2/D), so that B B^T = I. Public code of this idea takes
frequencies up to pi over [0, 1]: three periods at most, and 12 of its 32 rows are independent. Learned
frequencies f e^delta, delta = 0 at the start, lose that orthogonality; the condition of B is measured.

    hybrid  x = (1 - r) E[token] + r c B,     r = ramp sigmoid(theta),     sigmoid(theta) = ratio at first

both of the same size at the start. A controller moves the ramp from 0 to 1; theta is learned from there.
Tied logits are (h B^T) C^T, and of the hybrid (1 - r) h E^T + r (h B^T) C^T.

Letters: B sequences, T positions, D width, V vocabulary, H waves, M = 2H.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import HarmonicsConfig, HybridEmbeddingConfig
from sra_ds.model.embeddings.rank import MEASURED_TOKENS, effective_rank
from sra_ds.model.facts import Facts
from sra_ds.ops.linear import linear
from sra_ds.ops.precision import at_least_float32, widest


class Waves(nn.Module):
    """What embeddings made of waves share: a table of every token's coefficients, beside a vector of
    `own` numbers of its own, and the waves."""

    basis_MD: Tensor

    def __init__(self, config: HarmonicsConfig, vocab_size: int, width: int, own: int = 0) -> None:
        super().__init__()
        self.width, self.harmonics, self.dropout = width, config.harmonics, config.dropout
        self.own, self.table_width = own, own + 2 * config.harmonics
        self.polar = config.coefficients == "polar"
        columns = own if self.polar else self.table_width
        if columns:
            self.weight = nn.Parameter(torch.empty(vocab_size, columns))
        if self.polar:
            self.amplitude_VH = nn.Parameter(torch.empty(vocab_size, config.harmonics))
            self.phase_VH = nn.Parameter(torch.empty(vocab_size, config.harmonics))
        self.frequency_shift_H: nn.Parameter | None = None
        if config.frequencies == "learnable":
            self.frequency_shift_H = nn.Parameter(torch.empty(config.harmonics))
        else:
            self.register_buffer("basis_MD", torch.empty(2 * config.harmonics, width), False)

    def table(self, ids: Tensor | None = None) -> Tensor:
        """Own vector and c of the given tokens, or of all, side by side: ... x (own + M)."""
        if not self.polar:
            return _rows(self.weight, ids)
        amplitude, phase = _rows(self.amplitude_VH, ids), _rows(self.phase_VH, ids)
        waves = [amplitude * phase.cos(), amplitude * phase.sin()]
        return torch.cat([_rows(self.weight, ids), *waves] if self.own else waves, -1)

    def tied_parameters(self) -> list[nn.Parameter]:
        """Parameters the head reads (ZeRO-3 has to fetch them for it)."""
        return list(self.parameters())

    def basis(self) -> Tensor:
        """The waves as rows, M x D."""
        if self.frequency_shift_H is None:
            return self.basis_MD
        shift_H = self.frequency_shift_H
        frequencies_H = first_frequencies(self.harmonics, self.width, shift_H.device)
        waves_MD = wave_basis(frequencies_H * shift_H.to(frequencies_H.dtype).exp(), self.width)
        return waves_MD.to(shift_H.dtype)

    def measure(self, c_BTM: Tensor, x_BTD: Tensor, basis_MD: Tensor) -> Facts:
        """Of the first tokens: mean amplitude and the entropy of the mean spectrum over ln H; size and
        effective rank of the vectors. Of learned waves the condition of B. A step of decoding tells
        nothing."""
        if x_BTD.shape[1] == 1:
            return {}
        with torch.no_grad():
            c_NM = at_least_float32(c_BTM.flatten(0, 1)[:MEASURED_TOKENS])
            x_ND = x_BTD.flatten(0, 1)[:MEASURED_TOKENS]
            amplitude_H = torch.hypot(*c_NM.chunk(2, -1)).mean(0)
            share_H = amplitude_H / amplitude_H.sum().clamp(min=1e-30)
            entropy = torch.special.entr(share_H).sum() / math.log(max(self.harmonics, 2))
            facts = {
                "amplitude": amplitude_H.mean(),
                "spectrum_entropy": entropy,
                "wave_rms": at_least_float32(c_NM @ basis_MD.to(c_NM.dtype)).square().mean().sqrt(),
                "effective_rank": effective_rank(x_ND),
            }
            if self.frequency_shift_H is not None:
                gram_MM = at_least_float32(basis_MD) @ at_least_float32(basis_MD).T
                ends = torch.linalg.eigvalsh(gram_MM)[[0, -1]].clamp(min=1e-30)
                facts["basis_condition"] = (ends[1] / ends[0]).sqrt()
        return facts

    @torch.no_grad()
    def spectrum(self) -> Tensor:
        """Mean amplitude of each wave over the vocabulary, H."""
        return torch.hypot(*self.table()[:, self.own :].float().chunk(2, -1)).mean(0)

    @torch.no_grad()
    def frequencies(self) -> Tensor:
        """Periods of each wave over the width, H."""
        shift_H = self.frequency_shift_H
        first_H = first_frequencies(self.harmonics, self.width)
        return first_H if shift_H is None else first_H * shift_H.cpu().double().exp()


class SpectralEmbedding(Waves):
    """ids_BT, positions_BT -> (x_BTD, facts); tied logits through `output_factors`."""

    def forward(self, ids_BT: Tensor, positions_BT: Tensor) -> tuple[Tensor, Facts]:
        """Vectors of the tokens; positions enter in the mixer."""
        del positions_BT
        c_BTM, basis_MD = self.table(ids_BT), self.basis()
        x_BTD = linear(c_BTM, basis_MD.T)
        facts = self.measure(c_BTM, x_BTD, basis_MD)
        return F.dropout(x_BTD, self.dropout, self.training), facts

    def output_factors(self, h_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(h', W_V) such that the tied logits are h' @ W_V.T; h' has `table_width` columns."""
        return linear(h_ND, self.basis()), self.table()


class HybridEmbedding(Waves):
    """ids_BT, positions_BT -> (x_BTD, facts); tied logits through `output_factors`."""

    ramp: Tensor

    def __init__(self, config: HybridEmbeddingConfig, vocab_size: int, width: int) -> None:
        super().__init__(config, vocab_size, width, own=width)
        self.config = config
        self.mixing_logit = nn.Parameter(torch.empty(1))
        self.register_buffer("ramp", torch.empty(()))

    def ratio(self) -> Tensor:
        """Share of the waves r. While the ramp rises, r follows it alone."""
        held = self.mixing_logit.detach()
        logit = torch.where(self.ramp < 1, held, self.mixing_logit)
        return self.ramp.to(logit.dtype) * logit.sigmoid()

    def forward(self, ids_BT: Tensor, positions_BT: Tensor) -> tuple[Tensor, Facts]:
        """Vectors of the tokens; positions enter in the mixer."""
        del positions_BT
        token_BTD, c_BTM = self.table(ids_BT).tensor_split([self.own], -1)
        basis_MD, ratio = self.basis(), self.ratio()
        x_BTD = (1 - ratio) * token_BTD + ratio * linear(c_BTM, basis_MD.T)
        facts = self.measure(c_BTM, x_BTD, basis_MD)
        facts["ratio"] = ratio.detach().float().squeeze()
        measured_ND = token_BTD.detach().flatten(0, 1)[:MEASURED_TOKENS]
        facts["token_rms"] = at_least_float32(measured_ND).square().mean().sqrt()
        return F.dropout(x_BTD, self.dropout, self.training), facts

    def output_factors(self, h_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(h', W_V) such that the tied logits are h' @ W_V.T; h' has `table_width` columns."""
        ratio = self.ratio()
        own_NT = torch.cat([(1 - ratio) * h_ND, ratio * linear(h_ND, self.basis())], -1)
        return own_NT, self.table()


def _rows(table: Tensor, ids: Tensor | None) -> Tensor:
    return table if ids is None else F.embedding(ids, table)


def first_frequencies(harmonics: int, width: int, device: torch.device | None = None) -> Tensor:
    """Whole numbers of periods over the width, evenly spread below width / 2, in float64."""
    step = (width // 2 - 1) // harmonics
    return step * torch.arange(1, harmonics + 1, dtype=widest(device), device=device)


def wave_basis(frequencies_H: Tensor, width: int) -> Tensor:
    """sqrt(2/D) times the sines, then the cosines, of 2 pi f d/D as rows, M x D; orthonormal for
    different whole frequencies between 0 and D/2."""
    places_D = torch.arange(width, dtype=frequencies_H.dtype, device=frequencies_H.device) / width
    angles_HD = 2 * math.pi * frequencies_H[:, None] * places_D
    return torch.cat([angles_HD.sin(), angles_HD.cos()]) * math.sqrt(2 / width)
