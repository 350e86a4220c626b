"""How alike the outputs of a token's experts are: the mean squared cosine of its pairs of experts.

    c_k = y_k - mean output of that expert,     overlap = mean over pairs i < j of cos(c_i, c_j)^2

0 where outputs are orthogonal, 1 where they are the same direction, whatever their size. Experts share a
part that does not depend on the token (their biases, first of all), which is no likeness of what they do
and is taken out. Letters: T tokens, K experts per token, E experts, D width.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sra_ds.ops.precision import at_least_float32


def output_overlap(
    rows_TKD: Tensor, ids_TK: Tensor, experts: int, valid_T: Tensor | None = None
) -> Tensor:
    """Overlap of each token, T, 0 at tokens that are not valid; in float32 at least.

    Experts' means are over the valid tokens given here. An expert of one token has nothing left and
    overlaps with none.
    """
    units_TKD = normalize(centred(rows_TKD, ids_TK, experts, valid_T), dim=-1)
    squared_TKK = (units_TKD @ units_TKD.transpose(1, 2)).square()
    upper = torch.triu(torch.ones_like(squared_TKK[0], dtype=torch.bool), 1)
    pairs = max(int(upper.shape[0] * (upper.shape[0] - 1) / 2), 1)
    overlap_T = (squared_TKK * upper).sum((1, 2)) / pairs
    return overlap_T if valid_T is None else overlap_T * valid_T


def centred(
    rows_TKD: Tensor, ids_TK: Tensor, experts: int, valid_T: Tensor | None = None
) -> Tensor:
    """Outputs less their expert's mean over the valid tokens."""
    rows_TKD = at_least_float32(rows_TKD)
    ids_R, rows_RD = ids_TK.flatten(), rows_TKD.flatten(0, 1)
    counted_R = rows_RD.new_ones(len(rows_RD))
    if valid_T is not None:
        counted_R = valid_T.to(rows_RD.dtype).repeat_interleave(ids_TK.shape[1])
    count_E = rows_RD.new_zeros(experts).index_add(0, ids_R, counted_R)
    sums_ED = rows_RD.new_zeros(experts, rows_RD.shape[1])
    sums_ED = sums_ED.index_add(0, ids_R, rows_RD * counted_R.unsqueeze(-1))
    mean_ED = sums_ED / count_E.clamp(min=1).unsqueeze(-1)
    return rows_TKD - mean_ED[ids_TK]


def output_overlap_reference(
    rows_TKD: Tensor, ids_TK: Tensor, experts: int, valid_T: Tensor | None = None
) -> Tensor:
    """Definition of `output_overlap`, pair by pair."""
    T, K, _ = rows_TKD.shape
    valid = torch.ones(T, dtype=torch.bool) if valid_T is None else valid_T.bool()
    means = {}
    for expert in range(experts):
        own = rows_TKD[(ids_TK == expert) & valid.unsqueeze(1)]
        means[expert] = own.mean(0) if len(own) else rows_TKD.new_zeros(rows_TKD.shape[2])
    found = []
    for t in range(T):
        parts = [rows_TKD[t, k] - means[int(ids_TK[t, k])] for k in range(K)]
        cosines = [
            torch.cosine_similarity(parts[i], parts[j], dim=0)
            for i in range(K)
            for j in range(i + 1, K)
        ]
        mean = torch.stack(cosines).square().mean() if cosines else rows_TKD.sum() * 0
        found.append(mean * valid[t])
    return torch.stack(found)
