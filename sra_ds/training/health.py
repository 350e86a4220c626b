"""Watching a run: what is known of each layer's experts, and where a non-finite number came from.

this step           load, probabilities, temperature, largest gate
the last million    load over as many tokens: what an expert's death is told by
since the start     drift of the anchors
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sra_ds.config.model import HashRouterConfig, MoEChannelConfig
from sra_ds.config.training import WINDOW_TOKENS
from sra_ds.data.loader import Batch
from sra_ds.metrics import (
    is_dead,
    layers_summary,
    load_histogram,
    load_summary,
    stacked_loads,
)
from sra_ds.model.language_model import LanguageModel, ModelOutput
from sra_ds.moe.routing import Routing
from sra_ds.processes import mean_over_ranks
from sra_ds.training.alarms import Alarm, Key, judge, rules
from sra_ds.training.anchors import AnchorDrift
from sra_ds.training.controllers.schedules import current_top_k
from sra_ds.training.hooks import hooked

BUCKETS = 32
NOT_FORWARD = "the gradient (the forward pass is finite)"


class RecentLoad:
    """Routes per layer and expert over the newest steps that hold at least a million tokens, kept in
    about 32 buckets, so that a checkpoint can carry them."""

    def __init__(self, window_tokens: int = WINDOW_TOKENS) -> None:
        self.window_tokens = window_tokens
        self.tokens = 0
        self.load_LE: Tensor | None = None
        self.slots_L: list[int] = []
        self._buckets: deque[tuple[int, Tensor]] = deque()

    def add(self, routings: Sequence[Routing], tokens: int) -> None:
        """One micro-batch of `tokens` valid tokens over all ranks."""
        if not routings:
            return
        load_LE = stacked_loads([r.load_E for r in routings])
        self.slots_L = [len(r.load_E) for r in routings]
        if self.load_LE is not None and self.load_LE.shape[1] < load_LE.shape[1]:
            self._widen(load_LE.shape[1])  # a ghost woke
        if self._buckets and self._buckets[-1][0] + tokens <= self.window_tokens // BUCKETS:
            last_tokens, last_LE = self._buckets.pop()
            self._buckets.append((last_tokens + tokens, last_LE + load_LE))
        else:
            self._buckets.append((tokens, load_LE))
        self.tokens += tokens
        self.load_LE = load_LE.clone() if self.load_LE is None else self.load_LE + load_LE
        while self.tokens - self._buckets[0][0] >= self.window_tokens:
            old_tokens, old_LE = self._buckets.popleft()
            self.tokens -= old_tokens
            self.load_LE = self.load_LE - old_LE

    def _widen(self, slots: int) -> None:
        """Room for experts that had no routes so far."""
        assert self.load_LE is not None
        more = slots - self.load_LE.shape[1]
        self.load_LE = pad(self.load_LE, (0, more))
        self._buckets = deque(
            (tokens, pad(load_LE, (0, more))) for tokens, load_LE in self._buckets
        )

    def dead_experts(self) -> list[list[int]]:
        """Experts of each layer with fewer than 1e-4 of the window's routes."""
        if self.load_LE is None:
            return []
        return [
            dead_E[:slots].nonzero().flatten().tolist()
            for dead_E, slots in zip(is_dead(self.load_LE), self._slots(), strict=True)
        ]

    def _slots(self) -> list[int]:
        """How many experts of each layer could be chosen last."""
        assert self.load_LE is not None
        return self.slots_L or [self.load_LE.shape[1]] * len(self.load_LE)

    def state_dict(self) -> list[Any]:
        """The buckets as plain JSON values."""
        return [[tokens, load_LE.tolist()] for tokens, load_LE in self._buckets]

    def load_state_dict(self, buckets: list[Any]) -> None:
        """Take back what `state_dict` gave."""
        self._buckets.clear()
        for tokens, load in buckets:
            self._buckets.append((tokens, torch.tensor(load, dtype=torch.float64)))
        self.tokens = sum(tokens for tokens, _ in self._buckets)
        if self._buckets:
            self.load_LE = torch.stack([load_LE for _, load_LE in self._buckets]).sum(0)

    def summary(self) -> dict[str, Any] | None:
        """Health of every layer; `dead_fraction` is over all layers at the stricter definition (fewer
        than 1e-4 of the routes). None for a dense model."""
        if self.load_LE is None:
            return None
        found = layers_summary(self.load_LE, self.tokens, self._slots())
        return {"window_tokens": self.tokens, "dead": found["dead_by_routes"], **found}


class Health:
    """What a run knows of its experts, over all ranks, and the alarms that are active."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.channel = model, model.config.channel
        self.recent = RecentLoad()
        self.drift = AnchorDrift(model)
        self.active: dict[Key, None] = {}  # in the order in which they began

    def facts(self, routings: Sequence[Routing]) -> dict[str, Any]:
        """For a line of metrics after a step; `docs/health.md` lists the figures. Collective."""
        recent = self.recent.summary()
        if recent is None:
            return {}
        return {
            "top_k": current_top_k(self.model),
            "dead_fraction": recent["dead_fraction"],
            "layers": self._layers(routings),
        }

    def _layers(self, routings: Sequence[Routing]) -> list[dict[str, Any]]:
        dead = [len(experts) for experts in self.recent.dead_experts()]
        gates, drifts = self._top_gates(routings), self.drift.by_layer()
        layers = []
        for number, routing in enumerate(routings):
            tokens = float(routing.load_E.sum()) / routing.expert_ids_TK.shape[1]
            layer: dict[str, Any] = load_summary(routing.load_E, tokens)
            if isinstance(self.channel, MoEChannelConfig) and self.channel.ghosts.count:
                theirs = routing.load_E[self.channel.experts :].sum()
                layer["ghost_share"] = float(theirs / routing.load_E.sum().clamp(min=1))
            layer["load_histogram"] = load_histogram(routing.load_E)
            layer["dead_fraction"] = dead[number] / len(routing.load_E)
            layer["probs_max"] = float(routing.mean_probs_E.max())
            layer["probs_min"] = float(routing.mean_probs_E.min())
            if routing.temperature is not None:
                layer["temperature"] = float(routing.temperature)
            if gates is not None:
                layer["top_gate"] = gates[number]
            if drifts is not None:
                layer["anchor_drift"] = drifts[number]
            layers.append(layer)
        return layers

    def _top_gates(self, routings: Sequence[Routing]) -> list[float] | None:
        """Mean over tokens of each layer's largest gate, near 1 where the softmax is one-hot; None where
        a gate does not tell: by a hash, and of one expert with any gate but `all`. Collective."""
        channel, top_k = self.channel, routings[0].expert_ids_TK.shape[1]
        if not isinstance(channel, MoEChannelConfig) or channel.experts == 1:
            return None
        router = channel.router
        if isinstance(router, HashRouterConfig) or (top_k == 1 and router.gate != "all"):
            return None
        own_L = torch.stack([r.gates_TK.detach().amax(-1).mean() for r in routings])
        gates: list[float] = mean_over_ranks(own_L).tolist()
        return gates

    def alarms(self, layers: Sequence[dict[str, Any]]) -> list[Alarm]:
        """What began and what ended, by the figures of `facts`; from then on active, or not."""
        top_k = current_top_k(self.model)
        if top_k is None or not isinstance(self.channel, MoEChannelConfig):
            return []
        found = judge(layers, rules(self.channel, top_k, self.recent.tokens), self.active)
        for alarm in found:
            if alarm.state == "begins":
                self.active[alarm.key] = None
            else:
                del self.active[alarm.key]
        return found

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON values; where the anchors began is in the checkpoint's tensors."""
        return {"recent_load": self.recent.state_dict(), "alarms": list(self.active)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; of a run without alarms none are known."""
        self.recent.load_state_dict(state["recent_load"])
        self.recent.slots_L = [router.slots for router in self.model.routers()]
        self.active = {
            (kind, figure, int(at)): None for kind, figure, at in state.get("alarms", [])
        }

    def shown(self) -> dict[str, str]:
        """For the progress bar: over the window dead experts, the worst max violation and the fewest
        effective experts of a layer; the first active alarm and how many more there are."""
        recent = self.recent.summary()
        if recent is None:
            return {}
        fewest = min(layer["effective_experts"] for layer in recent["per_layer"])
        violation = f"{recent['max_violation']:.1f}"
        shown = {"dead": str(recent["dead"]), "viol": violation, "eff": f"{fewest:.2f}"}
        for kind, _, layer in list(self.active)[:1]:
            more = f"+{len(self.active) - 1}" if len(self.active) > 1 else ""
            shown["ALARM"] = f"{kind}@{layer}{more}"
        return shown


def first_non_finite(engine: Any, batch: Batch) -> str:
    """Name of the first part whose output is not finite on this batch; `NOT_FORWARD` if all are."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                found.append(name)

        return hook

    parts = [("embedding", engine.module.embedding)]
    for number, block in enumerate(engine.module.blocks):
        parts += [
            (f"layer {number} mixer", block.mixer),
            (f"layer {number} channel", block.channel),
        ]
        if block.memory is not None:
            parts.append((f"layer {number} memory", block.memory))
    parts.append(("final norm", engine.module.final_norm))
    handles = [module.register_forward_hook(watch(name)) for name, module in parts]
    with hooked(handles), torch.no_grad():
        output: ModelOutput = engine(*batch)
    if found:
        return found[0]
    if output.loss_sum is not None and not torch.isfinite(output.loss_sum):
        return "head"
    return NOT_FORWARD
