"""Controllers: the only things that change a schedule. Each is applied before a step from the step's
number alone or moves on its own after a step, and keeps what it must remember in `state_dict()`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sra_ds.config import Recipe
from sra_ds.config.model import MoEChannelConfig, PersistentMemoryConfig, WaveletsConfig
from sra_ds.config.training import ScheduleConfig
from sra_ds.model.embeddings.spectral import HybridEmbedding
from sra_ds.model.language_model import LanguageModel
from sra_ds.model.memories.fast import write_memories
from sra_ds.model.mixers.filters import LowPass
from sra_ds.moe.routing import Routing


class Event(Protocol):
    """Something to be told of a step: a line of metrics of its own, and one for the person watching."""

    @property
    def record(self) -> str:
        """Its key in the line of metrics."""

    def _asdict(self) -> dict[str, Any]:
        """What the line holds."""

    def line(self) -> str:
        """For the person watching."""


class Intervention(NamedTuple):
    """Something a controller changed because of what it saw, and not by schedule. One list entry per
    expert."""

    kind: str
    layer: int
    experts: list[int]
    load: list[float]
    """Over the mean load, in the window that called for it."""
    before: list[float]
    """`raise_floor`: selection bias; `reseed_dead_anchors`: mean cosine of the anchor with the tokens."""
    after: list[float]

    @property
    def record(self) -> str:
        """Its key in the line of metrics."""
        return "remedy"

    def line(self) -> str:
        """For the person watching."""
        numbers = ", ".join(map(str, self.experts[:8])) + ", ..." * (len(self.experts) > 8)
        return f"remedy {self.kind} in layer {self.layer}: {len(self.experts)} experts ({numbers})"


class Seen(NamedTuple):
    """What a finished step found out, over all ranks and micro-batches."""

    routings: Sequence[Routing] = ()
    """One per routed layer, of the last micro-batch with the loads of all."""
    memory_states_HCC: Sequence[Tensor] = ()
    """One per layer with a persistent memory."""
    saturations: Sequence[Tensor] = ()
    """One per layer with ghosts, the mean of the step."""


class Controller(Protocol):
    """Owner of one schedule."""

    def on_step_start(self, step: int) -> None:
        """Set what step `step` (from 0) uses."""

    def on_step_end(self, step: int, seen: Seen) -> Sequence[Event]:
        """Learn from the finished step. What is to be told of it."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


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


class InBuffers:
    """What controllers share whose schedule is buffers of the model: they have nothing else to save."""

    def on_step_start(self, step: int) -> None:
        del step

    def on_step_end(self, step: int, seen: Seen) -> Sequence[Event]:
        del step, seen
        return ()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


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


class SelectionBias(InBuffers):
    """Auxiliary-loss-free balancing (Wang et al. 2024, arXiv 2408.15664): b += u sign(mean - load)."""

    def __init__(self, model: LanguageModel, rate: float) -> None:
        self.routers, self.rate = model.routers(), rate

    def on_step_end(self, step: int, seen: Seen) -> Sequence[Event]:
        del step
        for router, routing in zip(self.routers, seen.routings, strict=True):
            error_E = routing.load_E.mean() - routing.load_E[: router.experts]
            router.selection_bias_E.add_(self.rate * torch.sign(error_E))
        return ()


class MemoryWriter(InBuffers):
    """Writes persistent memories: what documents start from moves towards where windows ended."""

    def __init__(self, model: LanguageModel) -> None:
        self.memories = model.persistent_memories()

    def on_step_end(self, step: int, seen: Seen) -> Sequence[Event]:
        del step
        write_memories(self.memories, seen.memory_states_HCC)
        return ()


def build_controllers(recipe: Recipe, model: LanguageModel) -> dict[str, Controller]:
    """The controllers a recipe asks for, by name."""
    training = recipe.training
    controllers: dict[str, Controller] = {}
    if training.top_k_schedule:
        controllers["top_k"] = TopKSchedule(model, training.top_k_schedule, training.steps)
    if training.temperature_schedule:
        knots = training.temperature_schedule
        controllers["temperature"] = TemperatureSchedule(model, knots, training.steps)
    if training.selection_bias_rate > 0:
        controllers["selection_bias"] = SelectionBias(model, training.selection_bias_rate)
    if isinstance(model.embedding, HybridEmbedding):
        controllers["ratio"] = RatioRamp(model.embedding, training.steps)
    mixer = recipe.model.mixer
    if isinstance(mixer, WaveletsConfig) and len(mixer.families) > 1:
        choosing = [module for module in model.modules() if isinstance(module, LowPass)]
        ends = mixer.choice_temperature
        controllers["choice_temperature"] = ChoiceTemperature(choosing, ends, training.steps)
    if isinstance(recipe.model.memory, PersistentMemoryConfig):
        controllers["memory"] = MemoryWriter(model)
    return controllers


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
