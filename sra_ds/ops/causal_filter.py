"""Filters over positions that look back only, and not beyond the start of a document.

    y[t] = sum_k taps[k] x[t - k dilation],     terms with k dilation > room[t] left out

`room[t]` is how many earlier positions belong to the same document. Written as shifted additions: one
pass over the vectors per tap, forwards and backwards, and nothing kept but the input. (A depthwise
convolution has no way to leave terms out, and on CPUs took twice as long.)

Letters: B sequences, S positions of which the last T are new, D channels, K taps.
"""

from typing import Any

import torch
from torch import Tensor


def causal_filter(x_BSD: Tensor, taps: Tensor, dilation: int, room_BT: Tensor) -> Tensor:
    """y_BTD at the last T positions. `taps` are K, the same for all channels, or K x D."""
    found: Tensor = _CausalFilter.apply(x_BSD, taps, dilation, room_BT)
    return found


def causal_filter_reference(x_BSD: Tensor, taps: Tensor, dilation: int, room_BT: Tensor) -> Tensor:
    """Definition of `causal_filter`, position by position."""
    past = x_BSD.shape[1] - room_BT.shape[1]
    rows = []
    for t in range(room_BT.shape[1]):
        y_BD = torch.zeros_like(x_BSD[:, 0])
        for k, tap in enumerate(taps):
            lag = k * dilation
            if past + t >= lag:
                seen_B1 = (room_BT[:, t] >= lag)[:, None]
                y_BD = y_BD + torch.where(seen_B1, tap * x_BSD[:, past + t - lag], 0.0)
        rows.append(y_BD)
    return torch.stack(rows, 1)


class _CausalFilter(torch.autograd.Function):
    @staticmethod
    def forward(x_BSD: Tensor, taps: Tensor, dilation: int, room_BT: Tensor) -> Tensor:
        past = x_BSD.shape[1] - room_BT.shape[1]
        y_BTD = x_BSD[:, past:] * taps[0]
        for k, read, written in _shifts(x_BSD.shape[1], room_BT.shape[1], len(taps), dilation):
            weight = _seen(room_BT[:, written], k * dilation, x_BSD) * taps[k]
            y_BTD[:, written].addcmul_(x_BSD[:, read], weight)
        return y_BTD

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        x_BSD, taps, ctx.dilation, room_BT = inputs
        ctx.save_for_backward(x_BSD, taps, room_BT)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> Any:
        x_BSD, taps, room_BT = ctx.saved_tensors
        new = x_BSD.shape[1] - room_BT.shape[1]
        grad_x_BSD = torch.zeros_like(x_BSD)
        grad_x_BSD[:, new:] = grad_BTD * taps[0]
        of_taps = [_to_shape_of(taps, x_BSD[:, new:] * grad_BTD)]
        for k, read, written in _shifts(x_BSD.shape[1], room_BT.shape[1], len(taps), ctx.dilation):
            seen_BT1 = _seen(room_BT[:, written], k * ctx.dilation, x_BSD)
            own_BTD = grad_BTD[:, written]
            grad_x_BSD[:, read].addcmul_(own_BTD, seen_BT1 * taps[k])
            if ctx.needs_input_grad[1]:
                of_taps.append(_to_shape_of(taps, x_BSD[:, read] * own_BTD * seen_BT1))
        if not ctx.needs_input_grad[1]:
            return grad_x_BSD, None, None, None
        unseen = len(taps) - len(of_taps)  # those that reach beyond the first position
        of_taps += [torch.zeros_like(taps[0])] * unseen
        return grad_x_BSD, torch.stack(of_taps), None, None


def _shifts(length: int, new: int, taps: int, dilation: int) -> list[tuple[int, slice, slice]]:
    """(tap, what it reads, what it writes) for every tap but the first that reaches a position."""
    past = length - new
    found = []
    for k in range(1, taps):
        lag = k * dilation
        first = max(0, lag - past)
        if first < new:
            found.append((k, slice(past + first - lag, length - lag), slice(first, new)))
    return found


def _seen(room_BT: Tensor, lag: int, like: Tensor) -> Tensor:
    """1 where a position may look so far back, else 0; B x T x 1."""
    return (room_BT >= lag).unsqueeze(-1).to(like.dtype)


def _to_shape_of(taps: Tensor, x_BTD: Tensor) -> Tensor:
    """Sum over positions, and over channels where they share their taps."""
    return x_BTD.sum() if taps.dim() == 1 else x_BTD.sum((0, 1))
