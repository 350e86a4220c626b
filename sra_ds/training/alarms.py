"""Alarms: what the figures of a layer say has gone wrong, and what to do about it. Pure functions.

    collapse                 all tokens go to nearly the same k experts
    dead_layer               more than half of the experts get no tokens
    saturated_temperature    the softmax is one-hot, or a learned temperature has run away

An alarm begins where a figure leaves the band `healthy` and ends where it is back inside the narrower
band `recovered`, so that a figure at the edge is told of once.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from sra_ds.config.model import CosineRouterConfig, HashRouterConfig, MoEChannelConfig
from sra_ds.metrics import DEAD_SHARE

TELLING_TOKENS = round(10 / DEAD_SHARE)
"""Tokens of which an expert at the limit of death gets at least ten, so that none are no accident (at
random e^-10)."""
LARGEST_TEMPERATURE = 100.0
"""Above it learning is known to become unstable: CLIP (Radford et al. 2021, arXiv 2103.00020, 2.5)."""

Key = tuple[str, str, int]
"""Kind, figure and layer of an alarm."""


class Band(NamedTuple):
    """Where a figure may be, bounds included."""

    low: float = -math.inf
    high: float = math.inf

    def bound_crossed(self, value: float) -> float | None:
        """The bound that a value lies beyond, None inside."""
        if value < self.low:
            return self.low
        return self.high if value > self.high else None


class Rule(NamedTuple):
    """When an alarm of a kind begins and ends, by one figure of a layer."""

    kind: str
    figure: str
    healthy: Band
    recovered: Band
    remedy: str


class Alarm(NamedTuple):
    """A figure left its band, or is back in it."""

    kind: str
    layer: int
    state: Literal["begins", "ends"]
    figure: str
    value: float
    threshold: float | None
    """The bound that was crossed when it began."""
    remedy: str | None

    @property
    def key(self) -> Key:
        """What tells it from others that are active."""
        return self.kind, self.figure, self.layer

    @property
    def record(self) -> str:
        """Its key in the line of metrics."""
        return "alarm"

    def line(self) -> str:
        """For the person watching."""
        value = f"{self.figure} {self.value:.4g}"
        if self.state == "ends":
            return f"{self.kind} in layer {self.layer} is over: {value}"
        assert self.threshold is not None
        side = "below" if self.value < self.threshold else "above"
        return (
            f"ALARM {self.kind} in layer {self.layer}: {value} is {side} {self.threshold:.4g}; "
            f"{self.remedy}"
        )


def rules(channel: MoEChannelConfig, top_k: int, window_tokens: int) -> list[Rule]:
    """Those that apply to a layer while it chooses `top_k` experts and the load is known over so many
    tokens."""
    found = []
    if top_k < channel.experts:
        found.append(_collapse(channel.experts, top_k))
    if window_tokens >= TELLING_TOKENS:
        found.append(DEAD_LAYER)
    if not isinstance(channel.router, HashRouterConfig):
        found.append(ONE_HOT)
    router = channel.router
    if isinstance(router, CosineRouterConfig) and router.temperature in ("global", "per_expert"):
        found.append(_runaway(router.initial_temperature))
    return found


def judge(
    layers: Sequence[Mapping[str, Any]], rules: Iterable[Rule], active: Collection[Key]
) -> list[Alarm]:
    """What begins and what ends, given the figures of each layer and the alarms that are active; a rule
    whose figure a layer does not have says nothing."""
    found = []
    for rule in rules:
        for number, layer in enumerate(layers):
            if rule.figure not in layer:
                continue
            value, known = float(layer[rule.figure]), (rule.kind, rule.figure, number) in active
            crossed = (rule.recovered if known else rule.healthy).bound_crossed(value)
            if crossed is not None and not known:
                begun = Alarm(rule.kind, number, "begins", rule.figure, value, crossed, rule.remedy)
                found.append(begun)
            elif crossed is None and known:
                found.append(Alarm(rule.kind, number, "ends", rule.figure, value, None, None))
    return found


def _collapse(experts: int, top_k: int) -> Rule:
    """Of exp(entropy of the load) / E, which is k / E if all tokens go to the same k experts and 1 if the
    load is even: from a twentieth of the way between on, until it is a tenth."""

    def at(share: float) -> float:
        return (top_k + share * (experts - top_k)) / experts

    remedy = (
        "--resume with training.remedies.reseed_dead_anchors=true (cosine router); or a new run "
        "(--init-from) with a larger losses.balance.weight, or training.selection_bias_rate=0.01"
    )
    return Rule("collapse", "effective_experts", Band(low=at(0.05)), Band(low=at(0.1)), remedy)


DEAD_LAYER = Rule(
    "dead_layer",
    "dead_fraction",
    Band(high=0.5),
    Band(high=0.4),
    "--resume with training.remedies.reseed_dead_anchors=true (cosine router) or "
    "training.remedies.raise_floor={}; or a new run (--init-from) with a larger losses.balance.weight",
)
ONE_HOT = Rule(
    "saturated_temperature",
    "top_gate",
    Band(high=0.99),
    Band(high=0.98),
    "--resume with a lower training.optimizer.learning_rate; or a new run (--init-from) with a larger "
    "losses.z_weight, or with model.channel.router.temperature=fixed and a lower initial_temperature",
)


def _runaway(initial: float) -> Rule:
    """A learned temperature: up to 100, or ten times where it began; down to a tenth of that."""
    high = max(LARGEST_TEMPERATURE, 10 * initial)
    healthy, recovered = Band(initial / 10, high), Band(initial / 8, 0.8 * high)
    return Rule("saturated_temperature", "temperature", healthy, recovered, ONE_HOT.remedy)
