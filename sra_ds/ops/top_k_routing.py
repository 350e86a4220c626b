"""From scores to a routing: top-k with a fixed order, gates, and the statistics losses need.

    scores_TE -> top-k ids (ties to the lower id) -> gates, load, mean probabilities, log-sum-exp

Letters: T tokens, E experts, K experts per token. All of it in float32 at least.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sra_ds.ops.precision import at_least_float32

GATE_EPS = 1e-6


class Selection(NamedTuple):
    """What decides beside the scores who is chosen and counted: `bias_E` and `noise_TE` are added to the
    scores for the choice alone; tokens that are not valid (bool) are left out of the statistics."""

    valid_T: Tensor | None = None
    bias_E: Tensor | None = None
    noise_TE: Tensor | None = None


EVERYONE = Selection()


class TopKRouting(NamedTuple):
    """Gates and ids of the chosen experts, and statistics over the valid tokens; `moe.routing.Routing`
    says what each field is."""

    gates_TK: Tensor
    expert_ids_TK: Tensor
    load_E: Tensor
    mean_probs_E: Tensor
    lse_T: Tensor
    valid_count: Tensor


def top_k_routing(
    scores_TE: Tensor, top_k: int, gate: str, selection: Selection = EVERYONE
) -> TopKRouting:
    """Top-k routing of scores. Bias and noise decide with them who is chosen; gates and statistics come
    from the clean scores."""
    scores_TE = at_least_float32(scores_TE)
    lse_T = scores_TE.logsumexp(-1)
    probs_TE = (scores_TE - lse_T.unsqueeze(-1)).exp()
    competing_TE = scores_TE.detach()
    for change in (selection.bias_E, selection.noise_TE):
        competing_TE = competing_TE if change is None else competing_TE + change
    ids_TK = top_k_lowest_id(competing_TE, top_k)
    gates_TK = gate_weights(scores_TE, lse_T, ids_TK, gate)
    return TopKRouting(gates_TK, ids_TK, *statistics(probs_TE, ids_TK, lse_T, selection.valid_T))


def top_k_lowest_id(scores_TE: Tensor, top_k: int) -> Tensor:
    """Ids of the k largest scores: k different ones, ties to the lower id, NaN as low as -inf."""
    lowest = torch.finfo(scores_TE.dtype).min
    remaining_TE = scores_TE.detach().nan_to_num(nan=lowest, posinf=torch.inf, neginf=lowest)
    ids = []
    for _ in range(top_k):
        best_T1 = remaining_TE.argmax(-1, keepdim=True)
        ids.append(best_T1)
        remaining_TE = remaining_TE.scatter(-1, best_T1, -torch.inf)
    return torch.cat(ids, -1)


def gate_weights(scores_TE: Tensor, lse_T: Tensor, expert_ids_TK: Tensor, form: str) -> Tensor:
    """Combine weights of the selected experts; the forms are those of `RouterConfig.gate`."""
    chosen_TK = scores_TE.gather(-1, expert_ids_TK)
    single = expert_ids_TK.shape[-1] == 1
    if form == "selected" or (form == "straight_through" and not single):
        return chosen_TK.softmax(-1)
    probs_TK = (chosen_TK - lse_T.unsqueeze(-1)).exp()
    if form == "straight_through":
        return 1.0 + (probs_TK - probs_TK.detach())  # exactly 1
    return probs_TK if single else probs_TK / (probs_TK.sum(-1, keepdim=True) + GATE_EPS)


def statistics(
    probs_TE: Tensor, expert_ids_TK: Tensor, lse_T: Tensor, valid_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(load_E, mean_probs_E, lse_T, valid_count) over the valid tokens."""
    valid = torch.ones_like(lse_T) if valid_T is None else valid_T.to(lse_T.dtype)
    count = valid.sum()
    weights_R = valid.unsqueeze(-1).expand_as(expert_ids_TK).flatten()
    load_E = probs_TE.new_zeros(probs_TE.shape[-1]).index_add(0, expert_ids_TK.flatten(), weights_R)
    mean_probs_E = (valid.unsqueeze(0) @ probs_TE).squeeze(0) / count.clamp(min=1)
    return load_E, mean_probs_E, lse_T * valid, count
