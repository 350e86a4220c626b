"""Attention that refines its query by what it found, until its weights are sharp (resonance).

Keys and values are computed once. For t = 0 .. iterations - 1, P^t = softmax(beta^t q^t K^T / sqrt(C)),

    o^t = P^t V        h^t = entropy(P^t) / ln(visible positions), mean over heads, in [0, 1]
    q^{t+1} = q^t + sigmoid(g) R(W_u o^t)        beta = 1 + softplus(b)

a retrieval step of a modern Hopfield network with a learned map of what was retrieved (arXiv 2008.02217).
R turns by the query's rotary angle, as it has turned q^0, so that scores stay functions of distance.
beta >= 1 lets the weights sharpen. Each token halts by its own entropy:

    soft    lambda^t = sigmoid((threshold - h^t) / softness), omega^t = lambda^t prod_{u<t} (1 - lambda^u)
            y = out(sum_t omega^t o^t), the last taking what is left (PonderNet, arXiv 2107.05407)
    hard    y = out(o^t) of the first t with h^t < threshold, or of the last; queries that go on are
            gathered, in each row of the batch as many as in the row with the most

Whether a token halts is a function of what it may see: nothing leaks from later tokens or other rows.

Letters: B sequences, T new positions, S visible positions, H heads, C channels per head, A queries that
go on, I iterations.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_ds.config.model import ResonanceConfig
from sra_ds.model.context import Context
from sra_ds.model.facts import Facts, Halting, sum_over_valid
from sra_ds.model.mixers.attention import Angles, HeadsMixer, attend, rotate
from sra_ds.ops.entropy_attention import Attended, entropy_attention, flex_entropy_attention
from sra_ds.ops.precision import at_least_float32


class Keys(NamedTuple):
    """What queries attend to: k and v, B x H x S x C, what each query may see, B x 1 x T x S, and the
    logarithm of how much that is, B x T."""

    k_BHSC: Tensor
    v_BHSC: Tensor
    visible_B1TS: Tensor
    log_visible_BT: Tensor


class Halted(NamedTuple):
    """What the iterations came to: the output, relative entropies (NaN after a token has halted), the
    number of iterations, and the mean size of a query's change over the query's."""

    y_BHTC: Tensor
    entropy_IBT: Tensor
    count_BT: Tensor
    query_step: Tensor


class Resonance(HeadsMixer):
    """x_BTD, context -> (y_BTD, facts). Halting and threshold may be changed after training."""

    def __init__(self, config: ResonanceConfig, width: int) -> None:
        super().__init__(config, width)
        self.iterations, self.kernel = config.iterations, config.kernel
        self.halting: str = config.halting
        self.threshold, self.softness = config.threshold, config.softness
        if config.iterations > 1:
            channels = width // config.heads
            self.retrieval_weight = nn.Parameter(torch.empty(config.heads, channels, channels))
            self.update_gate = nn.Parameter(torch.empty(config.heads))
            self.sharpening = nn.Parameter(torch.empty(config.heads))

    def forward(
        self, x_BTD: Tensor, context: Context, cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Facts]:
        """Attend within what `context.visible_B1TS` allows; `cache` keeps keys and values."""
        angles = self.angles(context)
        q, k, v = self.project(x_BTD, angles, cache)
        if self.iterations == 1:
            return self.merge(attend(q, k, v, context)), {}
        visible = _visible(context, q.shape[2], k.shape[2])
        wide = torch.promote_types(q.dtype, torch.float32)
        seen_BT = visible.sum(-1, dtype=wide)[:, 0]
        keys = Keys(k, v, visible, seen_BT.log().expand(len(q), -1))
        if self.halting == "soft":
            found = self._halt_softly(q, keys, angles)
        else:
            found = self._halt_hard(q, keys, angles, context.valid_BT)
        facts: Facts = {
            "halting": _halting(found.entropy_IBT, found.count_BT, context.valid_BT),
            "query_step": found.query_step,
        }
        if self.halting == "soft":
            facts["penalties"] = {
                "ponder": sum_over_valid(found.count_BT, context.valid_BT),
                "entropy": sum_over_valid(found.entropy_IBT[-1], context.valid_BT),
            }
        return self.merge(found.y_BHTC), facts

    def _halt_softly(self, q_BHTC: Tensor, keys: Keys, angles: Angles | None) -> Halted:
        """Every iteration of every token, weighted; the number of iterations is the expected one."""
        entropies, outputs, shares, steps = [], [], [], []
        left_BT = torch.ones_like(keys.log_visible_BT)
        for number in range(self.iterations):
            found = self._attend(q_BHTC, keys, number)
            entropy_BT = relative_entropy(found.entropy_BHT, keys.log_visible_BT)
            halt_BT = torch.ones_like(entropy_BT)
            if number < self.iterations - 1:
                halt_BT = ((self.threshold - entropy_BT) / self.softness).sigmoid()
                update_BHTC = self._update(found.out_BHTC, angles)
                steps.append(_relative_size(update_BHTC, q_BHTC))
                q_BHTC = q_BHTC + update_BHTC
            entropies.append(entropy_BT)
            outputs.append(found.out_BHTC)
            shares.append(left_BT * halt_BT)
            left_BT = left_BT - shares[-1]
        weighted = (
            share_BT[:, None, :, None].to(out_BHTC.dtype) * out_BHTC
            for share_BT, out_BHTC in zip(shares, outputs, strict=True)
        )
        count_BT = sum(number * share_BT for number, share_BT in enumerate(shares, 1))
        y_BHTC, query_step = sum(weighted), torch.stack(steps).mean()
        return Halted(y_BHTC, torch.stack(entropies), count_BT, query_step)  # type: ignore[arg-type]

    def _halt_hard(
        self, q_BHTC: Tensor, keys: Keys, angles: Angles | None, valid_BT: Tensor | None
    ) -> Halted:
        """The first iteration of every token and the next ones of those that go on; padding does not.
        What is found for queries that only fill up a row is dropped."""
        B, _, T, _ = q_BHTC.shape
        found = self._attend(q_BHTC, keys, 0)
        y_BHTC, index_BA = found.out_BHTC, torch.arange(T, device=q_BHTC.device).expand(B, T)
        entropy_BA = relative_entropy(found.entropy_BHT, keys.log_visible_BT)
        entropy_IBT = entropy_BA.new_full((self.iterations, B, T), torch.nan)
        entropy_IBT[0] = entropy_BA.detach()
        goes_on_BA = entropy_BA >= self.threshold
        if valid_BT is not None:
            goes_on_BA = goes_on_BA & valid_BT
        steps = [torch.zeros((), device=q_BHTC.device)]
        for number in range(1, self.iterations):
            most = int(goes_on_BA.sum(1).max())
            if most == 0:
                break
            chosen_BA = goes_on_BA.byte().argsort(dim=-1, descending=True, stable=True)[:, :most]
            goes_on_BA, index_BA = goes_on_BA.gather(1, chosen_BA), index_BA.gather(1, chosen_BA)
            turned = None if angles is None else _pick_angles(angles, index_BA)
            update_BHTC = self._update(_pick(found.out_BHTC, chosen_BA), turned)
            q_BHTC = _pick(q_BHTC, chosen_BA)
            steps.append(_relative_size(update_BHTC, q_BHTC))
            q_BHTC = q_BHTC + update_BHTC
            own = _pick_keys(keys, index_BA)
            found = self._attend(q_BHTC, own, number, keys.k_BHSC.shape[2] - T + index_BA)
            entropy_BA = relative_entropy(found.entropy_BHT, own.log_visible_BT)
            y_BHTC = _put(y_BHTC, index_BA, found.out_BHTC, goes_on_BA)
            known_BA = entropy_BA.detach().where(goes_on_BA, torch.nan)
            entropy_IBT[number].scatter_(1, index_BA, known_BA)
            goes_on_BA = goes_on_BA & (entropy_BA >= self.threshold)
        # every process has gradients of the same parameters, also one whose tokens have all stopped
        for parameter in (self.retrieval_weight, self.update_gate, self.sharpening):
            y_BHTC = y_BHTC + 0.0 * parameter.sum()
        count_BT = entropy_IBT.isfinite().sum(0).to(entropy_IBT.dtype)
        return Halted(y_BHTC, entropy_IBT, count_BT, torch.stack(steps[1:] or steps).mean())

    def _attend(
        self, q_BHTC: Tensor, keys: Keys, number: int, positions_BT: Tensor | None = None
    ) -> Attended:
        """Iteration `number`: the weights are sharper by beta each time."""
        if number:
            beta_H = 1 + F.softplus(at_least_float32(self.sharpening))
            q_BHTC = q_BHTC * beta_H[:, None, None] ** number
        whole = positions_BT is None and q_BHTC.shape[2] == keys.k_BHSC.shape[2]
        flex = whole and self.kernel == "flex" and q_BHTC.is_cuda
        attention = flex_entropy_attention if flex else entropy_attention
        k, v, visible = keys.k_BHSC, keys.v_BHSC, keys.visible_B1TS
        return attention(q_BHTC.to(k.dtype), k, v, visible, positions_BT)

    def _update(self, out_BHTC: Tensor, angles: Angles | None) -> Tensor:
        """What an iteration adds to the query."""
        gate_H = at_least_float32(self.update_gate).sigmoid().to(out_BHTC.dtype)
        retrieved_BHTC = gate_H[:, None, None] * (out_BHTC @ self.retrieval_weight)
        return retrieved_BHTC if angles is None else rotate(retrieved_BHTC, *angles)


def relative_entropy(entropy_BHT: Tensor, log_visible_BT: Tensor) -> Tensor:
    """Mean over heads of the entropy over the largest there can be; 0 where only one position is seen."""
    mean_BT = entropy_BHT.mean(1) / log_visible_BT.clamp(min=1e-9)
    return mean_BT.where(log_visible_BT > 0, 0.0)


@torch.no_grad()
def _relative_size(update_BHTC: Tensor, q_BHTC: Tensor) -> Tensor:
    ratio: Tensor = update_BHTC.norm().float() / q_BHTC.norm().float().clamp(min=1e-30)
    return ratio


def _visible(context: Context, queries: int, length: int) -> Tensor:
    if context.visible_B1TS is not None:
        return context.visible_B1TS
    every_S = torch.arange(length, device=context.ids_BT.device)
    return (every_S <= every_S[length - queries :, None])[None, None]


def _halting(entropy_IBT: Tensor, count_BT: Tensor, valid_BT: Tensor | None) -> Halting:
    if valid_BT is not None:
        entropy_IBT = entropy_IBT.where(valid_BT, torch.nan)
        count_BT = count_BT.where(valid_BT, torch.nan)
    return Halting(entropy_IBT.detach(), count_BT.detach())


def _index(x_BHTC: Tensor, index_BA: Tensor) -> Tensor:
    return index_BA[:, None, :, None].expand(-1, x_BHTC.shape[1], -1, x_BHTC.shape[3])


def _pick(x_BHTC: Tensor, index_BA: Tensor) -> Tensor:
    """Some rows of each sequence, B x H x A x C."""
    return x_BHTC.gather(2, _index(x_BHTC, index_BA))


def _put(x_BHTC: Tensor, index_BA: Tensor, new_BHAC: Tensor, wanted_BA: Tensor) -> Tensor:
    """x with the wanted ones of the new rows in place of its own."""
    new_BHAC = new_BHAC.where(wanted_BA[:, None, :, None], _pick(x_BHTC, index_BA))
    return x_BHTC.scatter(2, _index(x_BHTC, index_BA), new_BHAC)


def _pick_keys(keys: Keys, index_BA: Tensor) -> Keys:
    """What some of the queries may see."""
    visible_B1TS = keys.visible_B1TS.expand(len(index_BA), -1, -1, -1)
    log_visible_BA = keys.log_visible_BT.gather(1, index_BA)
    return keys._replace(visible_B1TS=_pick(visible_B1TS, index_BA), log_visible_BT=log_visible_BA)


def _pick_angles(angles: Angles, index_BA: Tensor) -> Angles:
    cos_TC, sin_TC = angles
    return cos_TC[index_BA][:, None], sin_TC[index_BA][:, None]
