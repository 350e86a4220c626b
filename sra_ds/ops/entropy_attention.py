"""Softmax attention that also tells how sharp its weights are, without ever holding all of them.

    P = softmax(q K^T / sqrt(C))        o = P V        H = -sum_s P_s ln P_s = lse - sum_s P_s score_s

    entropy_attention            in chunks of queries, forwards and backwards: the CPU's way
    flex_entropy_attention       one fused kernel on a GPU: it attends to [V, K] at once, and
                                 H = lse - q.E_P[k] / sqrt(C)
    entropy_attention_reference  all T x S weights at once: the definition

The backward pass makes a chunk's weights again from the log-sum-exp. With upstream gradients do and dH,
dscore_s = P_s (do.v_s - do.o - dH (ln P_s + H)).

Letters: B sequences, H heads, T queries, S >= T keys, C channels per head; Q queries of a chunk, N = B*H.
Queries are the last T of the S positions unless said otherwise; none sees a position after its own.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from sra_ds.ops.precision import at_least_float32

CHUNK, SMALLEST_CHUNK = 64, 16
"""Queries whose weights exist at the same time."""
UNSEEN = -1e30
"""Score of a position that is not visible: finite, since 0 times it has to be 0; exp(it) is 0."""


class Attended(NamedTuple):
    """What was found, B x H x T x C, and the entropy of the weights in nats, B x H x T, in float32 at
    least."""

    out_BHTC: Tensor
    entropy_BHT: Tensor


def entropy_attention(
    q_BHTC: Tensor,
    k_BHSC: Tensor,
    v_BHSC: Tensor,
    visible_B1TS: Tensor | None = None,
    positions_BT: Tensor | None = None,
) -> Attended:
    """At most `CHUNK` x S weights of a head exist at a time. `visible_B1TS` None: causal, nothing else.

    `positions_BT` says which of the S positions each query stands at. Keys after the last of a chunk's
    queries are skipped, so `visible_B1TS` must be causal.
    """
    B, H, T, C = q_BHTC.shape
    out_NTC, entropy_NT = _EntropyAttention.apply(
        *(x.reshape(B * H, -1, C) for x in (q_BHTC, k_BHSC, v_BHSC)),
        _visible(q_BHTC, k_BHSC, visible_B1TS, positions_BT),
        _chunks(T, k_BHSC.shape[2], positions_BT),
    )
    return Attended(out_NTC.view(B, H, T, C), entropy_NT.view(B, H, T))


def entropy_attention_reference(
    q_BHTC: Tensor,
    k_BHSC: Tensor,
    v_BHSC: Tensor,
    visible_B1TS: Tensor | None = None,
    positions_BT: Tensor | None = None,
) -> Attended:
    """Definition of `entropy_attention`."""
    visible = _visible(q_BHTC, k_BHSC, visible_B1TS, positions_BT)
    scores_BHTS = at_least_float32(q_BHTC @ k_BHSC.mT) / math.sqrt(q_BHTC.shape[-1])
    log_weights = scores_BHTS.masked_fill(~visible, UNSEEN).log_softmax(-1)
    weights_BHTS = log_weights.exp()
    entropy_BHT = -(weights_BHTS * log_weights).sum(-1)
    return Attended(weights_BHTS.to(v_BHSC.dtype) @ v_BHSC, entropy_BHT)


def flex_entropy_attention(
    q_BHTC: Tensor,
    k_BHSC: Tensor,
    v_BHSC: Tensor,
    visible_B1TS: Tensor | None = None,
    positions_BT: Tensor | None = None,
) -> Attended:
    """`entropy_attention` by torch's flex attention: fused where it is compiled, which is on a GPU."""
    visible = _visible(q_BHTC, k_BHSC, visible_B1TS, positions_BT)
    visible = visible.expand(len(q_BHTC), -1, -1, -1)

    def only_visible(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        del h
        return torch.where(visible[b, 0, t, s], score, UNSEEN)

    attend = _compiled_flex() if q_BHTC.is_cuda else flex_attention
    found_BHTC, auxiliary = attend(
        q_BHTC,
        k_BHSC,
        torch.cat([v_BHSC, k_BHSC], -1),
        score_mod=only_visible,
        return_aux=AuxRequest(lse=True),
    )
    out_BHTC, mean_key_BHTC = found_BHTC.split(q_BHTC.shape[-1], -1)
    score_BHT = (at_least_float32(q_BHTC) * mean_key_BHTC).sum(-1) / math.sqrt(q_BHTC.shape[-1])
    return Attended(out_BHTC, (auxiliary.lse - score_BHT).clamp(min=0))


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


def _visible(
    q_BHTC: Tensor, k_BHSC: Tensor, visible_B1TS: Tensor | None, positions_BT: Tensor | None
) -> Tensor:
    """The given mask; without one, boolean B or 1 x 1 x T x S: positions up to the query's own."""
    if visible_B1TS is not None:
        return visible_B1TS
    length, queries = k_BHSC.shape[2], q_BHTC.shape[2]
    every_S = torch.arange(length, device=k_BHSC.device)
    own_BT = every_S[None, length - queries :] if positions_BT is None else positions_BT
    return (every_S <= own_BT[..., None])[:, None]


class _Chunk(NamedTuple):
    """Queries start .. stop, which see keys before `limit` only."""

    start: int
    stop: int
    limit: int


def _chunks(queries: int, length: int, positions_BT: Tensor | None) -> list[_Chunk]:
    size = CHUNK
    if positions_BT is not None:  # few queries of many positions: the first ones still see few keys
        size = max(SMALLEST_CHUNK, CHUNK * queries // length)
    parts = [(start, min(start + size, queries)) for start in range(0, queries, size)]
    if positions_BT is None:
        return [_Chunk(start, stop, length - queries + stop) for start, stop in parts]
    last_T = positions_BT.amax(0).cummax(0).values.tolist()
    return [_Chunk(start, stop, last_T[stop - 1] + 1) for start, stop in parts]


class _EntropyAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_NTC: Tensor, k_NSC: Tensor, v_NSC: Tensor, visible: Tensor, chunks: list[_Chunk]
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q_NTC.dtype, torch.float32)
        out_NTC = torch.empty_like(q_NTC)
        lse_NT = torch.empty(q_NTC.shape[:2], dtype=wide, device=q_NTC.device)
        entropy_NT = torch.empty_like(lse_NT)
        with torch.autocast(q_NTC.device.type, enabled=False):
            for rows, scores_NQS, seen in _scores(q_NTC, k_NSC, visible, chunks):
                most_NQ1 = scores_NQS.amax(-1, keepdim=True)
                below_NQS = scores_NQS.sub_(most_NQ1)
                weights = below_NQS.exp()  # times their sum
                total_NQ1 = weights.sum(-1, keepdim=True)
                found_NQC = torch.bmm(weights.to(v_NSC.dtype), v_NSC[:, seen])
                out_NTC[:, rows] = found_NQC / total_NQ1.to(found_NQC.dtype)
                log_total_NQ = total_NQ1.log().squeeze(-1)
                lse_NT[:, rows] = most_NQ1.squeeze(-1) + log_total_NQ
                mean_NQ = below_NQS.mul_(weights).sum(-1) / total_NQ1.squeeze(-1)
                entropy_NT[:, rows] = log_total_NQ - mean_NQ
        ctx.save_for_backward(q_NTC, k_NSC, v_NSC, visible, out_NTC, lse_NT, entropy_NT)
        ctx.chunks = chunks
        ctx.set_materialize_grads(False)
        return out_NTC, entropy_NT

    @staticmethod
    def backward(
        ctx: Any, d_out: Tensor | None, d_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_NTC, k_NSC, v_NSC, visible, out_NTC, lse_NT, entropy_NT = ctx.saved_tensors
        d_out = torch.zeros_like(out_NTC) if d_out is None else d_out
        d_q = torch.empty_like(q_NTC)
        d_k, d_v = torch.zeros_like(k_NSC), torch.zeros_like(v_NSC)
        mean_NT1 = (d_out * out_NTC).sum(-1, keepdim=True).to(lse_NT.dtype)
        for rows, log_weights, seen in _scores(q_NTC, k_NSC, visible, ctx.chunks):
            log_weights.sub_(lse_NT[:, rows, None])
            weights = log_weights.exp()
            narrow = weights.to(v_NSC.dtype)
            d_v[:, seen] += torch.bmm(narrow.mT, d_out[:, rows])
            d_scores = torch.bmm(d_out[:, rows], v_NSC[:, seen].mT).to(lse_NT.dtype)
            d_scores.sub_(mean_NT1[:, rows])
            if d_entropy is not None:
                log_weights.add_(entropy_NT[:, rows, None])
                d_scores.addcmul_(log_weights, d_entropy[:, rows, None], value=-1)
            d_scores = d_scores.mul_(weights).to(q_NTC.dtype)
            scale = 1 / math.sqrt(q_NTC.shape[-1])
            d_q[:, rows] = torch.bmm(d_scores, k_NSC[:, seen]).mul_(scale)
            d_k[:, seen] += torch.bmm(d_scores.mT, q_NTC[:, rows]).mul_(scale)
        return d_q, d_k, d_v, None, None


def _scores(
    q_NTC: Tensor, k_NSC: Tensor, visible: Tensor, chunks: list[_Chunk]
) -> Iterator[tuple[slice, Tensor, slice]]:
    """Per chunk its queries, their masked scores N x Q x S, and the keys these are of."""
    scale = 1 / math.sqrt(q_NTC.shape[-1])
    for start, stop, limit in chunks:
        rows, seen = slice(start, stop), slice(0, limit)
        scores_NQS = torch.bmm(q_NTC[:, rows], k_NSC[:, seen].mT)
        scores_NQS = at_least_float32(scores_NQS).mul_(scale)
        by_head = scores_NQS.view(len(visible), -1, *scores_NQS.shape[1:])
        by_head.masked_fill_(~visible[:, :, rows, seen], UNSEEN)
        yield rows, scores_NQS, seen
