"""`delta_rule` by flash-linear-attention's fused kernel, for GPUs; optional.

Its kernel takes sequences laid one behind the other, each with a state of its own to start from. So every
part of a row that belongs to one document becomes a sequence, and padding is left out:

    rows -> real tokens, packed; where each part begins; what it starts from -> kernel -> rows

Letters as in `delta_rule`; N parts, M real tokens. Its states are C x V.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sra_ds.errors import BackendUnavailable
from sra_ds.ops.delta_rule import DeltaRule
from sra_ds.ops.precision import at_least_float32

Kernel = Callable[..., tuple[Tensor, Tensor]]


def delta_rule_fla(
    q_BTHC: Tensor,
    k_BTHC: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    decay_H: Tensor,
    starts_BT: Tensor,
    valid_BT: Tensor | None = None,
    state_BHVC: Tensor | None = None,
    start_state_HVC: Tensor | None = None,
) -> DeltaRule:
    """`sra_ds.ops.delta_rule.delta_rule` with the same arguments. Raises `BackendUnavailable` without
    flash-linear-attention."""
    kernel = fused_kernel()
    valid_BT = torch.ones_like(starts_BT) if valid_BT is None else valid_BT
    shape = (len(q_BTHC), *v_BTHV.shape[2:], k_BTHC.shape[3])
    zeros_BHVC = v_BTHV.new_zeros(shape, dtype=torch.promote_types(v_BTHV.dtype, torch.float32))
    fresh_BHVC = zeros_BHVC if start_state_HVC is None else zeros_BHVC + start_state_HVC
    carried_BHVC = fresh_BHVC if state_BHVC is None else at_least_float32(state_BHVC)
    if not valid_BT.any():
        return DeltaRule(torch.zeros_like(v_BTHV), carried_BHVC)
    parts = find_parts(starts_BT & valid_BT, valid_BT)
    opened_N = parts.opened_N[:, None, None, None]
    first_NHVC = torch.where(opened_N, fresh_BHVC[parts.row_N], carried_BHVC[parts.row_N])
    log_decay_MH = at_least_float32(decay_H).log().expand(int(parts.ends_N[-1]), -1)
    y_1MHV, last_NHCV = kernel(
        *(x[valid_BT][None] for x in (q_BTHC, k_BTHC, v_BTHV)),
        g=log_decay_MH[None],
        beta=beta_BTH[valid_BT][None],
        scale=1.0,
        initial_state=first_NHVC.mT.contiguous(),
        output_final_state=True,
        cu_seqlens=torch.cat([parts.ends_N.new_zeros(1), parts.ends_N]),
    )
    y_BTHV = torch.zeros_like(v_BTHV).masked_scatter(valid_BT[..., None, None], y_1MHV[0])
    # the last part of a row comes last, and so decides; a row of padding keeps what it had
    last_B = torch.full((len(valid_BT),), -1, device=valid_BT.device)
    last_B = last_B.scatter_reduce(
        0, parts.row_N, torch.arange(len(parts.row_N)).to(last_B), "amax"
    )
    known_B111 = (last_B >= 0)[:, None, None, None]
    last_BHVC = torch.where(known_B111, last_NHCV.mT[last_B.clamp(min=0)], carried_BHVC)
    return DeltaRule(y_BTHV, last_BHVC)


class Parts(NamedTuple):
    """Stretches of real tokens of one row and document: how many tokens there are up to each one's end,
    its row, and whether a document starts with it."""

    ends_N: Tensor
    row_N: Tensor
    opened_N: Tensor


def find_parts(starts_BT: Tensor, valid_BT: Tensor) -> Parts:
    """Of the real tokens, packed row after row. Starts are at real tokens."""
    row_M = valid_BT.nonzero()[:, 0]
    opens_M = starts_BT[valid_BT]
    new_row_M = torch.ones_like(opens_M)
    new_row_M[1:] = row_M[1:] != row_M[:-1]
    first_N = (opens_M | new_row_M).nonzero()[:, 0]
    ends_N = torch.cat([first_N[1:], first_N.new_tensor([len(row_M)])])
    return Parts(ends_N, row_M[first_N], opens_M[first_N])


@cache
def fused_kernel() -> Kernel:
    """flash-linear-attention's chunked gated delta rule."""
    try:
        module: Any = import_module("fla.ops.gated_delta_rule")
    except ImportError as error:
        raise BackendUnavailable(
            f"model.memory.kernel=fla needs flash-linear-attention ({error}); "
            "pip install flash-linear-attention, or leave kernel=chunked"
        ) from None
    kernel: Kernel = module.chunk_gated_delta_rule
    return kernel
