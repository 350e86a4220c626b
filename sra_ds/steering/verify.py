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
from sra_ds.analysis.statistics import Measured, measured_change
from sra_ds.analysis.tables import table_from_counts, top_labels
from sra_ds.analysis.traces import Trace
from sra_ds.config.steering import AnyEdit, Boost, Scale, Steering, Suppress
from sra_ds.data.loader import IGNORED, Batch
from sra_ds.data.shards import TokenSplit
from sra_ds.errors import DataError
from sra_ds.inference.load import LoadedRun
from sra_ds.inference.places import Place
from sra_ds.inference.steer import steered
from sra_ds.steering.effect import NULL_EXPERTS, log_probs, nearest_in_load, neutral_batches

DOSES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
BOOSTS = (1.0, 2.0)
"""In units of scores."""

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


class Verifier:
    """Responses of one model on one text; the unsteered one is kept to compare with."""

    def __init__(
        self, loaded: LoadedRun, split: TokenSplit, targets: list[Target], max_tokens: int
    ) -> None:
        self.loaded, self.targets = loaded, targets
        self.batches = neutral_batches(loaded, split, max_tokens)
        self.base = [log_probs(loaded.model, batch) for batch in self.batches]
        self.neutral = self._respond()

    @torch.no_grad()
    def respond(self, *edits: AnyEdit) -> Response:
        """The response to edits."""
        with steered(self.loaded.model, Steering(edits=edits)):
            return self._respond()

    def _respond(self) -> Response:
        parts = [
            self._batch(batch, base) for batch, base in zip(self.batches, self.base, strict=True)
        ]
        return Response(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _batch(self, batch: Batch, base_BTV: Tensor) -> Response:
        now_BTV = log_probs(self.loaded.model, batch)
        counted_BT = batch.targets_BT != IGNORED
        kl_BT = (base_BTV.exp() * (base_BTV - now_BTV)).sum(-1)
        targets_BT1 = batch.targets_BT.clamp(min=0).unsqueeze(-1)
        nll_BT = -now_BTV.gather(-1, targets_BT1.to(now_BTV.device)).squeeze(-1)
        effects = []
        for target in self.targets:
            change_BT = _set_change(now_BTV, base_BTV, target.own_S)
            change_BT = change_BT - _set_change(now_BTV, base_BTV, target.control_S)
            effects.append(_window_sums(change_BT, counted_BT))
        tokens_W = counted_BT.sum(-1).double().numpy()
        effect_WX = np.stack(effects, -1) / tokens_W[:, None].clip(min=1)
        return Response(
            effect_WX, _window_sums(kl_BT, counted_BT), _window_sums(nll_BT, counted_BT), tokens_W
        )


def verify(
    loaded: LoadedRun, trace: Trace, split: TokenSplit, targets: list[Target], max_tokens: int
) -> list[dict[str, Any]]:
    """Dose and response of every target, with intervals over windows and the null of its slopes."""
    verifier = Verifier(loaded, split, targets, max_tokens)
    null = _null_responses(verifier, trace, targets)
    found = []
    for number, target in enumerate(tqdm(targets, "doses")):
        at = {"layer": target.layer, "expert": target.expert}
        edits: dict[str, AnyEdit] = {f"scale {c:g}": Scale(by=c, **at) for c in DOSES}
        edits |= {"suppress": Suppress(**at), **{f"boost {b:g}": Boost(by=b, **at) for b in BOOSTS}}
        responses = {name: verifier.respond(edit) for name, edit in edits.items()}
        own_null = {e: null[target.layer, e] for e in null_experts(trace, target)}
        slopes = {
            name: _slope(
                responses[low].effect_WX[:, number],
                responses[high].effect_WX[:, number],
                distance,
                [
                    (r[low].effect_WX[:, number], r[high].effect_WX[:, number])
                    for r in own_null.values()
                ],
            )
            for name, low, high, distance in SLOPES
        }
        found.append(
            {
                **at,
                "tokens": readable(loaded.tokenizer, target.own_S),
                "control": readable(loaded.tokenizer, target.control_S),
                "responses": {n: _told(r, verifier.neutral, number) for n, r in responses.items()},
                **{name: slope.as_dict() for name, slope in slopes.items()},
            }
        )
    return found


SLOPES = (
    ("suppression_slope", "scale 0", "scale 1", 1.0),
    ("boost_slope", "scale 1", "scale 4", 3.0),
)


def null_experts(trace: Trace, target: Target) -> list[int]:
    """The experts of the target's layer nearest to it in load, without the target."""
    return nearest_in_load(trace, target.layer, target.expert)[:NULL_EXPERTS]


def _null_responses(
    verifier: Verifier, trace: Trace, targets: list[Target]
) -> dict[tuple[int, int], dict[str, Response]]:
    wanted = sorted({(t.layer, e) for t in targets for e in null_experts(trace, t)})
    found = {}
    for layer, expert in tqdm(wanted, "null experts"):
        doses = {c: Scale(layer=layer, expert=expert, by=c) for c in (0.0, 4.0)}
        responses = {f"scale {c:g}": verifier.respond(edit) for c, edit in doses.items()}
        found[layer, expert] = {**responses, "scale 1": verifier.neutral}
    return found


def _slope(
    low_W: Floats, high_W: Floats, distance: float, null: list[tuple[Floats, Floats]]
) -> Measured:
    """Change of the response per unit of gate, beside the null experts' slopes."""
    null_R = np.array([float((high - low).mean()) / distance for low, high in null])
    return measured_change((high_W - low_W) / distance, null_R)


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
