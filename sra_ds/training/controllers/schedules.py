"""Schedules: functions of the step alone, and the controllers that set them in the model's buffers."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from sra_ds.config.model import MoEChannelConfig
from sra_ds.config.training import ScheduleConfig
from sra_ds.model.embeddings.spectral import HybridEmbedding
from sra_ds.model.language_model import LanguageModel
from sra_ds.model.mixers.filters import LowPass
from sra_ds.training.controllers.protocol import Event, InBuffers, Seen


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    if schedule.kind == "constant":
        share = 1.0
    elif schedule.kind == "linear":
        share = 1.0 - progress
    elif schedule.kind == "wsd":
        share = min(1.0, (1.0 - progress) / schedule.decay)
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (schedule.final + (1.0 - schedule.final) * share)


class TopKSchedule:
    """k steps up at given shares of the run."""

    def __init__(
        self, model: LanguageModel, knots: Sequence[tuple[float, float]], steps: int
    ) -> None:
        self.routers, self.knots, self.steps = model.routers(), knots, steps

    def on_step_start(self, step: int) -> None:
        reached = [int(k) for at, k in self.knots if at * self.steps <= step]
        set_top_k(self.routers, reached[-1])

    def on_step_end(self, step: int, seen: Seen) -> Sequence[Event]:
        del step, seen
        return ()

    def state_dict(self) -> dict[str, Any]:
        return {"top_k": self.routers[0].top_k}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_top_k(self.routers, state["top_k"])


class TemperatureSchedule(InBuffers):
    """Linear pieces for a fixed temperature."""

    def __init__(
        self, model: LanguageModel, knots: Sequence[tuple[float, float]], steps: int
    ) -> None:
        self.routers, self.knots, self.steps = model.routers(), knots, steps

    def on_step_start(self, step: int) -> None:
        for router in self.routers:
            router.temperature.fill_(interpolate(self.knots, step / self.steps))


class RatioRamp(InBuffers):
    """The share of the waves in a hybrid embedding grows from 0 to where its own parameter takes over; it
    never falls, neither in a longer run that goes on nor in one that starts from trained weights."""

    def __init__(self, embedding: HybridEmbedding, steps: int) -> None:
        self.embedding, self.length = embedding, embedding.config.ramp * steps

    def on_step_start(self, step: int) -> None:
        self.embedding.ramp.clamp_(min=min(1.0, step / self.length) if self.length else 1.0)


class ChoiceTemperature(InBuffers):
    """The draw among families of wavelets gets sharper, linearly over the run, and never less sharp."""

    def __init__(
        self, low_passes: Sequence[LowPass], ends: tuple[float, float], steps: int
    ) -> None:
        self.low_passes, self.ends, self.steps = low_passes, ends, steps

    def on_step_start(self, step: int) -> None:
        value = interpolate([(0.0, self.ends[0]), (1.0, self.ends[1])], step / self.steps)
        for low_pass in self.low_passes:
            low_pass.temperature.clamp_(max=value)


def set_top_k(routers: Sequence[Any], top_k: int) -> None:
    """For every routed layer."""
    for router in routers:
        router.top_k = top_k


def current_top_k(model: LanguageModel) -> int | None:
    """Experts per token now, None for a dense model."""
    if not isinstance(model.config.channel, MoEChannelConfig):
        return None
    return int(model.routers()[0].top_k)


def interpolate(knots: Sequence[tuple[float, float]], at: float) -> float:
    """Value of the piecewise linear curve through the knots; constant after the last."""
    for (x0, y0), (x1, y1) in itertools.pairwise(knots):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return knots[-1][1]
