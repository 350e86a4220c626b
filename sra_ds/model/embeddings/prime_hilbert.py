"""Tokens and positions in one subspace per prime, under a small table that is also the head's.

    u   = table[token] / 0.02                                        unit variance at the start
    z_p = LN(r_p u W_p + g_p tile(code_p(n)))                        for each prime p, m p dimensions
    x   = out(concat_p z_p) + skip(u)

code_p(n) is the real Fourier basis of the cyclic group Z_p at n mod p,

    [1/sqrt(p), sqrt(2/p) cos(2 pi k n/p), sqrt(2/p) sin(2 pi k n/p)] for k = 1 .. (p-1)/2,

p numbers, orthonormal over the residues; by the Chinese remainder theorem the codes together tell
positions apart up to the product of the primes. n counts from the start of the document. The position
never reaches the head: tied logits are (h W_h^T) table^T. Without the skip the rank of x over the
vocabulary is at most m times the sum of the primes.

Letters: B sequences, T positions, D width, U width of the table, P primes, S = m times their sum.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import PrimeHilbertEmbeddingConfig
from sra_ds.layers import Linear
from sra_ds.model.embeddings.rank import MEASURED_TOKENS, effective_rank
from sra_ds.model.facts import Facts
from sra_ds.ops.linear import linear
from sra_ds.ops.precision import widest

TABLE_STD = 0.02


class PrimeHilbertEmbedding(nn.Module):
    """ids_BT, positions_BT -> (x_BTD, facts); tied logits through `output_factors`."""

    def __init__(self, config: PrimeHilbertEmbeddingConfig, vocab_size: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.table_width = config.table_width
        self.sizes = [config.copies * prime for prime in config.primes]
        self.weight = nn.Parameter(torch.empty(vocab_size, config.table_width))
        self.subspaces_US = nn.Parameter(torch.empty(config.table_width, sum(self.sizes)))
        self.token_strength = nn.Parameter(torch.empty(len(self.sizes)))
        self.position_strength = nn.Parameter(torch.empty(len(self.sizes)))
        self.subspace_norms = nn.ModuleList(nn.LayerNorm(size) for size in self.sizes)
        self.out = Linear(sum(self.sizes), width)
        self.skip = Linear(config.table_width, width, bias=False) if config.token_skip else None
        self.head_map_UD = nn.Parameter(torch.empty(config.table_width, width))

    def forward(self, ids_BT: Tensor, positions_BT: Tensor) -> tuple[Tensor, Facts]:
        """Vectors of tokens at positions."""
        u_BTU = F.embedding(ids_BT, self.weight) / TABLE_STD
        tokens = linear(u_BTU, self.subspaces_US.T).split(self.sizes, -1)
        parts = []
        for number, prime in enumerate(self.config.primes):
            code = position_codes(prime, ids_BT.device).to(u_BTU.dtype)[positions_BT % prime]
            position = self.position_strength[number] * code.repeat(1, 1, self.config.copies)
            token = self.token_strength[number] * tokens[number]
            parts.append(self.subspace_norms[number](token + position))
        x_BTD = self.out(torch.cat(parts, -1))
        if self.skip is not None:
            x_BTD = x_BTD + self.skip(u_BTU)
        x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)
        return x_BTD, self._facts(tokens, x_BTD)

    def output_factors(self, h_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(h', W_V) such that the tied logits are h' @ W_V.T; h' has `table_width` columns."""
        return linear(h_ND, self.head_map_UD), self.weight

    def tied_parameters(self) -> list[nn.Parameter]:
        """Parameters the head reads (ZeRO-3 has to fetch them for it)."""
        return [self.weight, self.head_map_UD]

    @torch.no_grad()
    def _facts(self, tokens: Sequence[Tensor], x_BTD: Tensor) -> Facts:
        """Each prime's share of the token's squared length before the norms, the strengths of positions,
        and the effective rank of x."""
        lengths_P = torch.stack([z.flatten(0, 1)[:MEASURED_TOKENS].norm() for z in tokens])
        squares_P = (self.token_strength * lengths_P).float().square()
        facts: Facts = {"effective_rank": effective_rank(x_BTD.flatten(0, 1)[:MEASURED_TOKENS])}
        for number, prime in enumerate(self.config.primes):
            facts[f"share_{prime}"] = squares_P[number] / squares_P.sum()
            facts[f"position_strength_{prime}"] = self.position_strength[number].clone()
        return facts


def position_codes(prime: int, device: torch.device | None = None) -> Tensor:
    """code_p of the positions 0 .. p-1 as rows, p x p orthonormal, in float64."""
    waves_K = torch.arange(1, prime // 2 + 1, dtype=widest(device), device=device)
    places_p = torch.arange(prime, dtype=widest(device), device=device)
    angles_pK = places_p[:, None] * waves_K * (2 * math.pi / prime)
    constant_p1 = torch.full_like(places_p[:, None], 1 / math.sqrt(prime))
    if prime == 2:  # its one wave is its own mirror image
        return torch.cat([constant_p1, angles_pK.cos() / math.sqrt(2)], 1)
    waves = torch.cat([angles_pK.cos(), angles_pK.sin()], 1) * math.sqrt(2 / prime)
    return torch.cat([constant_p1, waves], 1)
