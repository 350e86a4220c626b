"""Specialisation over a run: how differently experts answer the same tokens, and the weight that asks for
more of it.

    every so many steps   S_l = 1 - CKA over tokens of the step, all experts of layer l on each
    with a target         log w_l += rate * clip(target - S_l, -1, 1) outside of a dead band, in bounds
                          w_l * 2 once when S_l fell by more than 0.1 since the measurement before

w_l is the weight of the layer's term of the orthogonality loss. The published controller multiplies a
weight onto itself, so that it decays whatever it sees; this one is bounded and forgets nothing on resume.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sra_ds.config import Recipe
from sra_ds.data.loader import Batch
from sra_ds.errors import ConfigError
from sra_ds.metrics import specialisation
from sra_ds.moe.experts import even_counts
from sra_ds.moe.layer import MoELayer
from sra_ds.seeds import generator
from sra_ds.training.anchors import router_inputs
from sra_ds.training.controllers.protocol import BatchOf, Event, Seen
from sra_ds.training.engine import gathered
from sra_ds.training.hooks import of_valid_tokens

COLLAPSE = 0.1
"""Fall of the score from one measurement to the next that is answered at once."""
MOST_EXPERTS = 16
"""Compared in a layer; of more, so many are drawn."""


class Measurement(NamedTuple):
    """The scores of all layers, and the weights that follow from them."""

    scores: list[float]
    weights: list[float] | None
    """None without a target."""
    collapsed: list[int]
    """Layers whose weight was doubled."""

    @property
    def record(self) -> str:
        """Its key in the line of metrics."""
        return "specialisation"

    def line(self) -> str:
        """For the person watching."""
        scores = ", ".join(f"{score:.3f}" for score in self.scores)
        told = f"specialisation (1 - CKA) by layer: {scores}"
        if self.weights is not None:
            told += "; weights " + ", ".join(f"{weight:.3g}" for weight in self.weights)
        return told + "".join(
            f"; layer {n} COLLAPSED, its weight was doubled" for n in self.collapsed
        )


class Specialisation:
    """Controller of each layer's weight of the orthogonality loss; without a target it only measures."""

    def __init__(self, recipe: Recipe, engine: Any, batch_of: BatchOf) -> None:
        config = recipe.training.specialisation
        assert config is not None
        self.config, self.engine, self.batch_of = config, engine, batch_of
        self.steps, self.seed = recipe.training.steps, recipe.training.seed
        self.layers: list[MoELayer] = engine.module.routed_layers()
        self.base = recipe.losses.orthogonality_weight
        self.previous: list[float] | None = None
        self.cooling = [False] * len(self.layers)
        start = [self.base * config.layer_decay**n for n in range(len(self.layers))]
        self.weights = [min(max(w, config.lowest), config.highest) for w in start]
        if config.target is not None:
            self._set_weights()

    def require_reachable(self) -> None:
        """Raise `ConfigError` if a layer has reached the target before it learnt anything. Collective."""
        if self.config.target is None:
            return
        scores = self.measure(0)
        if max(scores) >= self.config.target:
            raise ConfigError(
                f"training.specialisation.target={self.config.target} is no more than the untrained "
                f"experts have ({max(scores):.3f}): raise it, or leave it out to measure only"
            )

    def on_step_start(self, step: int) -> None:
        del step

    def on_step_end(self, step: int, seen: Seen) -> Sequence[Event]:
        """Measure when due, and move the weights. Collective then."""
        del seen
        if (step + 1) % self.config.every and step + 1 != self.steps:
            return ()
        scores = self.measure(step)
        collapsed = [] if self.config.target is None else self._move(scores)
        self.previous = scores
        weights = None if self.config.target is None else list(self.weights)
        return [Measurement(scores, weights, collapsed)]

    def measure(self, step: int) -> list[float]:
        """The score of every layer on tokens of a step's batch. Collective."""
        batch = first_windows(self.batch_of(step), self.config.tokens)
        experts = self.layers[0].config.experts
        drawn = [
            torch.randperm(experts, generator=generator(self.seed, "specialisation", number))
            for number in range(len(self.layers))
        ]
        drawn = [order_E[:MOST_EXPERTS].sort().values for order_E in drawn]
        outputs = all_outputs(self.engine, self.layers, batch, self.config.tokens)
        return [
            specialisation(outputs_END[own_E.to(outputs_END.device)])
            for outputs_END, own_E in zip(outputs, drawn, strict=True)
        ]

    def _move(self, scores: list[float]) -> list[int]:
        """New weights; the layers that collapsed."""
        config, collapsed = self.config, []
        assert config.target is not None
        for layer, score in enumerate(scores):
            fell = self.previous is not None and self.previous[layer] - score > COLLAPSE
            if fell and not self.cooling[layer]:
                self.weights[layer] *= 2
                collapsed.append(layer)
            elif abs(config.target - score) > config.dead_band:
                step = max(-1.0, min(1.0, config.target - score))
                self.weights[layer] *= math.exp(config.rate * step)
            self.cooling[layer] = fell
            self.weights[layer] = min(max(self.weights[layer], config.lowest), config.highest)
        self._set_weights()
        return collapsed

    def _set_weights(self) -> None:
        for layer, weight in zip(self.layers, self.weights, strict=True):
            layer.overlap_weight = weight / self.base

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "previous": self.previous, "cooling": self.cooling}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.previous = list(state["weights"]), state["previous"]
        self.cooling = list(state["cooling"])
        if self.config.target is not None:
            self._set_weights()


def first_windows(batch: Batch, tokens: int) -> Batch:
    """As many windows of a batch as hold so many tokens."""
    count = -(-tokens // batch.ids_BT.shape[1])
    cut = (None if part is None else part[:count] for part in batch)
    return Batch(*cut)  # type: ignore[arg-type]


@torch.no_grad()
def all_outputs(
    engine: Any, layers: Sequence[MoELayer], batch: Batch, tokens: int
) -> Iterator[Tensor]:
    """What every expert of each layer, ghosts left out, says to the first real tokens of a batch,
    E x N x D, without dropout, layer by layer. Collective."""
    if layers[0].config.expert_kind == "block":
        yield from _block_outputs(engine, layers, batch, tokens)
        return
    inputs = router_inputs([layer.router for layer in layers], engine, batch)
    for layer, x_ND in zip(layers, inputs, strict=True):
        experts, x_ND = layer.backend.experts, x_ND[:tokens]
        count = len(experts.expert_ids)
        training = experts.training
        experts.eval()
        with gathered(list(experts.parameters())):
            # past the module's hooks, which would give the weights back before they are used
            counts_E = even_counts(count, len(x_ND), x_ND.device)
            rows_RD = experts.forward(x_ND.repeat(count, 1), counts_E)
        experts.train(training)
        yield rows_RD.view(count, len(x_ND), -1)


def _block_outputs(
    engine: Any, layers: Sequence[MoELayer], batch: Batch, tokens: int
) -> list[Tensor]:
    """Blocks see whole sequences, so what they say is taken from a forward pass."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, outputs_NED: Tensor) -> None:
        del module, arguments
        seen.append(outputs_NED)

    handles = [layer.backend.register_forward_hook(keep) for layer in layers]
    found = of_valid_tokens(seen, handles, engine, batch)
    return [outputs_NED[:tokens].transpose(0, 1) for outputs_NED in found]
