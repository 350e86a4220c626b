"""Whether steering an expert does what its tokens promise: dose and response.

    dose       its gate times c = 0, 1/4, 1/2, 1, 2, 4; and suppressed, and its score raised
    response   log-probability of its top tokens, together, less that of other tokens as frequent
    cost       KL divergence from the unsteered model, and perplexity, on the same neutral text
    null       the slopes of 20 experts of the same layer and of nearest load, on the same tokens

The slope of suppression is the response per unit of gate between c = 0 and 1, that of boost between 1
and 4. Letters: W windows of text, N tokens, V vocabulary, S tokens of a set.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sra_ds.analysis.profiles import TOP_TOKENS, least_routes, readable
from sra_ds.analysis.statistics import measured_change
from sra_ds.analysis.tables import table_from_counts, top_labels
from sra_ds.analysis.traces import Trace
from sra_ds.config.steering import AnyEdit, Boost, Scale, Steering, Suppress
from sra_ds.data.loader import IGNORED, Batch
from sra_ds.data.shards import TokenSplit
from sra_ds.errors import DataError
from sra_ds.heap import giving_back
from sra_ds.inference.load import LoadedRun
from sra_ds.inference.places import Place
from sra_ds.inference.steer import steered
from sra_ds.model.language_model import LanguageModel
from sra_ds.steering.effect import (
    NULL_EXPERTS,
    log_probs,
    nearest_in_load,
    neutral_batches,
    token_divergences,
)

DOSES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
BOOSTS = (1.0, 2.0)
"""In units of scores."""
SLOPES = (
    ("suppression_slope", "scale 0", "scale 1", 1.0),
    ("boost_slope", "scale 1", "scale 4", 3.0),
)

Floats = NDArray[np.float64]


class Target(NamedTuple):
    """An expert, its top tokens, and other tokens of the same frequencies."""

    layer: int
    expert: int
    own_S: list[int]
    control_S: list[int]


class Response(NamedTuple):
    """Of one intervention, for each window: response of each target's tokens (W x targets), KL and
    loss summed over the window, and its tokens."""

    effect_WX: Floats
    kl_W: Floats
    nll_W: Floats
    tokens_W: Floats


def choose_targets(trace: Trace, experts: Sequence[Place]) -> list[Target]:
    """Top tokens of experts by PMI, each with the token nearest in frequency that is no top token.
    Raises `DataError` for an expert that serves too few."""
    frequency_V = np.bincount(trace.tokens_N, minlength=trace.vocab_size)
    ranked = np.argsort(-frequency_V, kind="stable")
    rank_V = np.empty(len(ranked), np.int64)
    rank_V[ranked] = np.arange(len(ranked))
    targets = []
    for layer, expert in experts:
        table = table_from_counts(trace.counts(layer), trace.vocab_size, trace.experts)
        own = top_labels(table, least_routes(trace), TOP_TOKENS)[expert]
        if not own:
            raise DataError(f"expert {layer}:{expert} serves too few tokens to have top tokens")
        taken, control = set(own), []
        for token in own:
            near = sorted(range(len(ranked)), key=lambda r, at=rank_V[token]: (abs(r - at), r))  # type: ignore[misc]
            twin = next(int(ranked[r]) for r in near if int(ranked[r]) not in taken)
            taken.add(twin)
            control.append(twin)
        targets.append(Target(layer, expert, own, control))
    return targets


@torch.no_grad()
def respond(
    model: LanguageModel,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    edits: Sequence[AnyEdit],
) -> list[Response]:
    """The response to nothing and to each edit. Batch by batch, so that the unsteered model's
    probabilities are kept for one batch alone."""
    cards = [Steering(edits=()), *(Steering(edits=(edit,)) for edit in edits)]
    parts: list[list[Response]] = [[] for _ in cards]
    for batch in tqdm(batches, "verifying"):
        base_BTV = log_probs(model, batch)
        for own, card in giving_back(zip(parts, cards, strict=True)):
            with steered(model, card):
                own.append(_compare(batch, base_BTV, log_probs(model, batch), targets))
    return [Response(*map(np.concatenate, zip(*own, strict=True))) for own in parts]


def _compare(
    batch: Batch, base_BTV: Tensor, now_BTV: Tensor, targets: Sequence[Target]
) -> Response:
    counted_BT = batch.targets_BT != IGNORED
    kl_BT = token_divergences(base_BTV, now_BTV)
    targets_BT1 = batch.targets_BT.clamp(min=0).unsqueeze(-1)
    nll_BT = -now_BTV.gather(-1, targets_BT1.to(now_BTV.device)).squeeze(-1)
    effects = []
    for target in targets:
        change_BT = _set_change(now_BTV, base_BTV, target.own_S)
        change_BT = change_BT - _set_change(now_BTV, base_BTV, target.control_S)
        effects.append(_window_sums(change_BT, counted_BT))
    tokens_W = counted_BT.sum(-1).double().numpy()
    effect_WX = np.stack(effects, -1) / tokens_W[:, None].clip(min=1)
    return Response(
        effect_WX, _window_sums(kl_BT, counted_BT), _window_sums(nll_BT, counted_BT), tokens_W
    )


def doses(model: LanguageModel, target: Target) -> dict[str, AnyEdit]:
    """Every edit of an expert, by name; it is not suppressed where a token goes to all there are."""
    router = model.routers()[target.layer]
    at = {"layer": target.layer, "expert": target.expert}
    scales: dict[str, AnyEdit] = {f"scale {c:g}": Scale(by=c, **at) for c in DOSES}
    boosts = {f"boost {b:g}": Boost(by=b, **at) for b in BOOSTS}
    suppress = {"suppress": Suppress(**at)} if router.slots > router.top_k else {}
    return {**scales, **suppress, **boosts}


def verify(
    loaded: LoadedRun, trace: Trace, split: TokenSplit, targets: list[Target], max_tokens: int
) -> list[dict[str, Any]]:
    """Dose and response of every target, with intervals over windows and the null of its slopes."""
    edits: dict[tuple[int, int, str], AnyEdit] = {}
    for target in targets:
        named = doses(loaded.model, target)
        edits |= {(target.layer, target.expert, name): edit for name, edit in named.items()}
        for expert in null_experts(trace, target):
            for c in (0.0, 4.0):
                scale = Scale(layer=target.layer, expert=expert, by=c)
                edits.setdefault((target.layer, expert, f"scale {c:g}"), scale)
    batches = neutral_batches(loaded, split, max_tokens)
    neutral, *found = respond(loaded.model, batches, targets, list(edits.values()))
    responses = dict(zip(edits, found, strict=True))

    def effect(number: int, expert: int, name: str) -> Floats:
        """Of one intervention on an expert of a target's layer; a gate times 1 is no intervention."""
        at = (targets[number].layer, expert, name)
        return (neutral if name == "scale 1" else responses[at]).effect_WX[:, number]

    rows = []
    for number, target in enumerate(targets):
        slopes = {}
        for name, low, high, distance in SLOPES:
            own_W, *null = (
                (effect(number, expert, high) - effect(number, expert, low)) / distance
                for expert in (target.expert, *null_experts(trace, target))
            )
            null_R = np.array([float(slope_W.mean()) for slope_W in null])
            slopes[name] = measured_change(own_W, null_R).as_dict()
        names = doses(loaded.model, target)
        own = {name: responses[target.layer, target.expert, name] for name in names}
        rows.append(
            {
                "layer": target.layer,
                "expert": target.expert,
                "tokens": readable(loaded.tokenizer, target.own_S),
                "control": readable(loaded.tokenizer, target.control_S),
                "responses": {name: _told(one, neutral, number) for name, one in own.items()},
                **slopes,
            }
        )
    return rows


def null_experts(trace: Trace, target: Target) -> list[int]:
    """The experts of the target's layer nearest to it in load, without the target."""
    return nearest_in_load(trace, target.layer, target.expert)[:NULL_EXPERTS]


def _told(response: Response, neutral: Response, number: int) -> dict[str, float | None]:
    """Response with its interval, and what it cost."""
    tokens = response.tokens_W.sum()
    effect = measured_change(response.effect_WX[:, number], np.empty(0))
    worse = float((response.nll_W - neutral.nll_W).sum() / tokens)
    return {
        "effect": effect.value,
        "low": effect.as_dict()["low"],
        "high": effect.as_dict()["high"],
        "kl": float(response.kl_W.sum() / tokens),
        "worse_by_nats_per_token": worse,
        "perplexity_ratio": float(np.exp(worse)),
    }


def _set_change(now_BTV: Tensor, base_BTV: Tensor, tokens_S: list[int]) -> Tensor:
    """Change of the log-probability that the next token is one of a set."""
    return now_BTV[..., tokens_S].logsumexp(-1) - base_BTV[..., tokens_S].logsumexp(-1)


def _window_sums(values_BT: Tensor, counted_BT: Tensor) -> Floats:
    sums_B: Floats = torch.where(counted_BT, values_BT.cpu(), 0.0).double().sum(-1).numpy()
    return sums_B
