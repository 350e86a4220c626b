"""How alike the outputs of a token's experts are: the mean squared cosine of its pairs of experts.

    c_k = y_k - mean output of all routes,     overlap = mean over pairs i < j of cos(c_i, c_j)^2

0 where outputs are orthogonal, 1 where they point the same way or opposite ways, whatever their size.
What every expert always says is no likeness of what they do and is taken out; the mean is one for all
experts, since means of each over its own tokens would tell identical experts apart. Letters: T tokens,
K experts per token, D width.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sra_ds.ops.precision import at_least_float32


def output_overlap(rows_TKD: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Overlap of each token, T, 0 at tokens that are not valid and for K = 1; in float32 at least. The
    mean is over the routes of the valid tokens given here."""
    rows_TKD = at_least_float32(rows_TKD)
    tokens, top_k, _ = rows_TKD.shape
    counted_T = rows_TKD.new_ones(tokens) if valid_T is None else valid_T.to(rows_TKD.dtype)
    mean_D = (counted_T @ rows_TKD.mean(1)) / counted_T.sum().clamp(min=1)
    units_TKD = normalize(rows_TKD - mean_D, dim=-1)
    squared_TKK = (units_TKD @ units_TKD.transpose(1, 2)).square()
    upper_KK = torch.ones(top_k, top_k, device=rows_TKD.device).triu(1)
    pairs = max(top_k * (top_k - 1) // 2, 1)
    return (squared_TKK * upper_KK).sum((1, 2)) / pairs * counted_T


def output_overlap_reference(rows_TKD: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Definition of `output_overlap`, pair by pair."""
    tokens, top_k, _ = rows_TKD.shape
    valid_T = torch.ones(tokens, dtype=torch.bool) if valid_T is None else valid_T
    mean_D = rows_TKD[valid_T].flatten(0, 1).mean(0)
    found = []
    for rows_KD, valid in zip(rows_TKD - mean_D, valid_T, strict=True):
        cosines = [
            torch.cosine_similarity(rows_KD[i], rows_KD[j], dim=0)
            for i in range(top_k)
            for j in range(i + 1, top_k)
        ]
        mean = torch.stack(cosines).square().mean() if cosines else rows_KD.sum() * 0
        found.append(mean * valid)
    return torch.stack(found)
