"""Gated delta rule: fast weights that every token writes and reads, a chunk of tokens at once.

    S_t = lambda S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        y_t = S_t q_t

`delta_rule_reference` is the definition (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464). A token
writes u_t = beta_t (v_t - lambda S_{t-1} k_t), since S_t = lambda S_{t-1} + u_t k_t^T. Row r of a
chunk is a_r decays away from S, the state before the chunk or at the start of its document, and
n_ri from row i <= r of the same document. All rows of a chunk then follow together from matrix
products and a triangular system (WY form, Yang et al. 2024, arXiv 2406.06484):

    u_r + beta_r sum_{i<r} lambda^n_ri (k_r . k_i) u_i = beta_r (v_r - lambda^a_r S k_r)
    y_r = lambda^a_r S q_r + sum_{i<=r} lambda^n_ri (q_r . k_i) u_i

Letters: B sequences, T positions, R rows of a chunk, H heads, C key channels, V value channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sra_ds.ops.precision import at_least_float32


class DeltaRule(NamedTuple):
    """What every position read, in the dtype of the values, and the state after the last position,
    float32 (float64 for float64 input)."""

    y_BTHV: Tensor
    state_BHVC: Tensor


def delta_rule(
    q_BTHC: Tensor,
    k_BTHC: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    decay_H: Tensor,
    starts_BT: Tensor,
    valid_BT: Tensor | None = None,
    state_BHVC: Tensor | None = None,
    start_state_HVC: Tensor | None = None,
    chunk: int = 32,
) -> DeltaRule:
    """Write and read the fast weights at every position, `chunk` positions at a time.

    `decay_H` is in (0, 1]. Where `starts_BT` (bool) the state becomes `start_state_HVC` (None:
    zeros) before the token decays and writes it. Where `valid_BT` (bool; None: everywhere) is False
    nothing decays, is written or starts, and y is of no use but finite. `state_BHVC` is the state
    before the first position (None: the start state). Keys of norm 1 with beta in [0, 2] never
    amplify what the state holds. ValueError if `chunk` < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, is {chunk}")
    valid_BT = torch.ones_like(starts_BT) if valid_BT is None else valid_BT
    with torch.autocast(q_BTHC.device.type, enabled=False):
        q_BHTC, k_BHTC, v_BHTV = (_heads_first(x) for x in (q_BTHC, k_BTHC, v_BTHV))
        beta_BHT1 = _heads_first((beta_BTH * valid_BT.unsqueeze(-1)).unsqueeze(-1))
        log_decay_H = at_least_float32(decay_H).log()
        start_HVC = None if start_state_HVC is None else at_least_float32(start_state_HVC)
        state_BHVC = _first_state(k_BHTC, v_BHTV, state_BHVC, start_HVC)
        # slices in place of `split` would each fill a whole gradient with zeros
        chunks = zip(
            *(x.split(chunk, 2) for x in (q_BHTC, k_BHTC, v_BHTV, beta_BHT1)),
            *(x.split(chunk, 1) for x in (starts_BT, valid_BT)),
            strict=True,
        )
        ys = []
        for q_BHRC, k_BHRC, v_BHRV, beta_BHR1, starts_BR, valid_BR in chunks:
            memory = _memory(log_decay_H, starts_BR, valid_BR)
            y_BHRV, state_BHVC = _chunk(
                q_BHRC, k_BHRC, v_BHRV, beta_BHR1, memory, state_BHVC, start_HVC
            )
            ys.append(y_BHRV)
        return DeltaRule(torch.cat(ys, 2).transpose(1, 2).to(v_BTHV.dtype), state_BHVC)


def delta_rule_reference(
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
    """Definition of `delta_rule`, token by token."""
    valid_BT = torch.ones_like(starts_BT) if valid_BT is None else valid_BT
    with torch.autocast(q_BTHC.device.type, enabled=False):
        q_BHTC, k_BHTC, v_BHTV = (_heads_first(x) for x in (q_BTHC, k_BTHC, v_BTHV))
        beta_BHT1 = _heads_first(beta_BTH.unsqueeze(-1))
        decay_H11 = at_least_float32(decay_H).view(-1, 1, 1)
        start_BHVC = _first_state(k_BHTC, v_BHTV, None, start_state_HVC)
        S_BHVC = _first_state(k_BHTC, v_BHTV, state_BHVC, start_state_HVC)
        ys = []
        for t in range(starts_BT.shape[1]):
            q_BHC1, k_BHC1, v_BHV1 = (x[:, :, t].unsqueeze(-1) for x in (q_BHTC, k_BHTC, v_BHTV))
            beta_BH11 = beta_BHT1[:, :, t].unsqueeze(-1)
            valid_B111 = valid_BT[:, t].view(-1, 1, 1, 1)
            starts_B111 = starts_BT[:, t].view(-1, 1, 1, 1) & valid_B111
            S_BHVC = torch.where(starts_B111, start_BHVC, S_BHVC)
            kept_BHVC = decay_H11 * (S_BHVC - beta_BH11 * (S_BHVC @ k_BHC1) @ k_BHC1.mT)
            S_BHVC = torch.where(valid_B111, kept_BHVC + beta_BH11 * v_BHV1 @ k_BHC1.mT, S_BHVC)
            ys.append((S_BHVC @ q_BHC1).squeeze(-1))
        return DeltaRule(torch.stack(ys, 1).to(v_BTHV.dtype), S_BHVC)


class _Memory(NamedTuple):
    """What is left at each row of a chunk of what each row wrote, of the state before the chunk and
    of the start state. Powers of the decay, or 0 where the row does not see it."""

    writes_BHRR: Tensor
    carried_BHR1: Tensor
    started_BHR1: Tensor


def _memory(log_decay_H: Tensor, starts_BR: Tensor, valid_BR: Tensor) -> _Memory:
    starts_BR = starts_BR & valid_BR
    decays_BR = valid_BR.cumsum(1)
    document_BR = starts_BR.cumsum(1)
    before_start_BR = torch.where(starts_BR, decays_BR - 1, 0).cummax(1).values
    between_BRR = (decays_BR.unsqueeze(2) - decays_BR.unsqueeze(1)).clamp(min=0)
    seen_BRR = (document_BR.unsqueeze(2) == document_BR.unsqueeze(1)).tril()
    powers_BHR1 = _powers(log_decay_H, (decays_BR - before_start_BR).unsqueeze(-1))
    carried_B1R1 = (document_BR == 0)[:, None, :, None]
    return _Memory(
        _powers(log_decay_H, between_BRR) * seen_BRR.unsqueeze(1),
        powers_BHR1 * carried_B1R1,
        powers_BHR1 * ~carried_B1R1,
    )


def _powers(log_decay_H: Tensor, counts_BXY: Tensor) -> Tensor:
    """decay^count, [B, H, X, Y], as an exponential: counts >= 0, so it can only fade to 0."""
    return (counts_BXY.unsqueeze(1) * log_decay_H.view(-1, 1, 1)).exp()


def _chunk(
    q_BHRC: Tensor,
    k_BHRC: Tensor,
    v_BHRV: Tensor,
    beta_BHR1: Tensor,
    memory: _Memory,
    state_BHVC: Tensor,
    start_HVC: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the rows of one chunk read, and the state after them."""

    def recalled(x_BHRC: Tensor) -> Tensor:
        carried_BHRV = memory.carried_BHR1 * (x_BHRC @ state_BHVC.mT)
        if start_HVC is None:
            return carried_BHRV
        return carried_BHRV + memory.started_BHR1 * (x_BHRC @ start_HVC.mT)

    writing_BHRC = beta_BHR1 * k_BHRC
    # the solver reads strictly below the diagonal, and takes ones on it
    u_BHRV = torch.linalg.solve_triangular(
        memory.writes_BHRR * (writing_BHRC @ k_BHRC.mT),
        beta_BHR1 * v_BHRV - recalled(writing_BHRC),
        upper=False,
        unitriangular=True,
    )
    y_BHRV = recalled(q_BHRC) + (memory.writes_BHRR * (q_BHRC @ k_BHRC.mT)) @ u_BHRV
    left_BHRC = memory.writes_BHRR[..., -1, :].unsqueeze(-1) * k_BHRC
    after_BHVC = memory.carried_BHR1[:, :, -1:] * state_BHVC + u_BHRV.mT @ left_BHRC
    if start_HVC is not None:
        after_BHVC = after_BHVC + memory.started_BHR1[:, :, -1:] * start_HVC
    return y_BHRV, after_BHVC


def _heads_first(x_BTHX: Tensor) -> Tensor:
    """[B, H, T, X] without gaps, so that the products of a chunk copy nothing."""
    return at_least_float32(x_BTHX).transpose(1, 2).contiguous()


def _first_state(
    k_BHTC: Tensor, v_BHTV: Tensor, state_BHVC: Tensor | None, start_HVC: Tensor | None
) -> Tensor:
    """The state before the first position: the one given, else the start state, else zeros."""
    if state_BHVC is not None:
        return at_least_float32(state_BHVC)
    batch, heads, _, keys = k_BHTC.shape
    if start_HVC is not None:
        return at_least_float32(start_HVC).expand(batch, -1, -1, -1)
    return k_BHTC.new_zeros(batch, heads, v_BHTV.shape[-1], keys)
