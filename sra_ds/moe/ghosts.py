"""What ghosts are judged and taught by: how a token's experts cover what its block does.

    apartness    O = 1 - mean overlap of the experts' outputs (`sra_ds.ops.output_overlap`)
    unexplained  U = sum |t - P t|^2 / sum |t - mean t|^2, cut off at 1, with P the projection onto the
                 span of the outputs of the token's experts and t the update of the whole block (mixer
                 and channel); it is large, too, where all tokens want a part that their experts lack
    saturation   O U: the experts differ already, and still much is left to none of them

All over valid tokens. Identical experts have O = 0, whatever U. Letters: T tokens, K experts per token,
D width.
"""

import torch
from torch import Tensor

from sra_ds.ops.precision import at_least_float32

RIDGE = 1e-6
"""Of the mean squared length of a token's outputs; spans of parallel outputs stay defined."""


@torch.no_grad()
def unexplained(target_TD: Tensor, rows_TKD: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """U, by least squares in float32 at least."""
    target_TD, rows_TKD = at_least_float32(target_TD), at_least_float32(rows_TKD)
    valid_T = _weights(valid_T, target_TD)
    gram_TKK = rows_TKD @ rows_TKD.transpose(1, 2)
    scale_T11 = gram_TKK.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)[:, None, None]
    eye_KK = torch.eye(gram_TKK.shape[-1], dtype=gram_TKK.dtype, device=gram_TKK.device)
    products_TK1 = rows_TKD @ target_TD.unsqueeze(-1)
    weights_TK1 = torch.linalg.solve(gram_TKK + RIDGE * scale_T11 * eye_KK, products_TK1)
    left_TD = target_TD - (weights_TK1 * rows_TKD).sum(1)
    mean_D = (valid_T.unsqueeze(0) @ target_TD) / valid_T.sum().clamp(min=1)
    spread = ((target_TD - mean_D).square().sum(-1) * valid_T).sum()
    missed: Tensor = (left_TD.square().sum(-1) * valid_T).sum()
    return (missed / spread.clamp(min=1e-12)).clamp(0, 1)


def background_error(guess_TD: Tensor, left_TD: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Sum over valid tokens of |guess - left|^2 / |left|^2, with `left` fixed: what a ghost that nobody
    chooses is taught by, whatever windows it is dealt."""
    guess_TD, left_TD = at_least_float32(guess_TD), at_least_float32(left_TD.detach())
    size_T = left_TD.square().sum(-1).clamp(min=1e-12)
    error_T = (guess_TD - left_TD).square().sum(-1) / size_T
    return (error_T * _weights(valid_T, error_T)).sum()


def _weights(valid_T: Tensor | None, like: Tensor) -> Tensor:
    return like.new_ones(len(like)) if valid_T is None else valid_T.to(like.dtype)
