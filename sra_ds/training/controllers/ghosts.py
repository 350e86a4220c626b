"""Ghosts over a run: asleep (alpha = 0) -> waking (alpha rises to 1) -> awake as any other expert.

    every step    the mean saturation of each layer over the last steps, of training tokens alone
    every check   a layer above the threshold for `patience` checks in a row wakes its next ghost: the
                  optimizer forgets what it kept of it, alpha starts to rise
    every step    alpha = steps since then / ramp, and the ghost's own learning rate

A published sketch has a threshold of 0.01, with which all ghosts wake in the first steps. How far alpha
is follows from the step alone, so a run that is resumed goes on within a ramp.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sra_ds.config import Recipe
from sra_ds.config.training import GhostScheduleConfig
from sra_ds.moe.layer import MoELayer
from sra_ds.training.controllers.protocol import Event, Seen
from sra_ds.training.controllers.schedules import learning_rate
from sra_ds.training.engine import ghost_group, set_group_learning_rate
from sra_ds.training.engine_state import forget


class Awakening(NamedTuple):
    """A ghost began to wake."""

    layer: int
    ghost: int
    saturation: float
    """Mean of the last steps, which called for it."""

    @property
    def record(self) -> str:
        """Its key in the line of metrics."""
        return "ghost"

    def line(self) -> str:
        """For the person watching."""
        return f"ghost {self.ghost} of layer {self.layer} wakes: saturation {self.saturation:.3f}"


class GhostKeeper:
    """Controller of the ghosts' alpha and learning rates."""

    def __init__(self, recipe: Recipe, engine: Any) -> None:
        schedule = recipe.training.ghosts
        assert schedule is not None
        self.config: GhostScheduleConfig = schedule
        self.training, self.engine = recipe.training, engine
        self.layers: list[MoELayer] = engine.module.routed_layers()
        self.saturation: list[float] | None = None
        self.streak = [0] * len(self.layers)
        self.woken_at = [self._woken_before(layer) for layer in self.layers]

    def _woken_before(self, layer: MoELayer) -> list[int]:
        """When ghosts began to wake whose weights come, awake, from another run."""
        awake = layer.router.ghost_alpha_G[: layer.router.awake].tolist()
        return [-max(1, round(alpha * self.config.ramp_steps)) for alpha in awake]

    def on_step_start(self, step: int) -> None:
        """How awake every ghost is in this step, and how fast it learns."""
        peak = self.training.optimizer.learning_rate
        rate = learning_rate(self.training.schedule, peak, step, self.training.steps)
        for number, layer in enumerate(self.layers):
            for ghost, woken in enumerate(self.woken_at[number]):
                alpha = min(1.0, (step - woken) / self.config.ramp_steps)
                layer.router.ghost_alpha_G[ghost] = alpha
                own = alpha * ghost_learning_rate(self.config.learning_rate, rate, peak)
                set_group_learning_rate(self.engine, ghost_group(number, ghost), own)

    def on_step_end(self, step: int, seen: Seen) -> Sequence[Event]:
        """Look at the step; at a check, wake who is called for."""
        self._average([float(saturation) for saturation in seen.saturations])
        if (step + 1) % self.config.every:
            return ()
        return [
            self._wake(number, step)
            for number in range(len(self.layers))
            if self._called_for(number, step)
        ]

    def _average(self, new: list[float]) -> None:
        """Exponential mean of as many steps as the window has."""
        share = 2 / (self.config.window + 1)
        old = new if self.saturation is None else self.saturation
        self.saturation = [a + share * (b - a) for a, b in zip(old, new, strict=True)]

    def _called_for(self, number: int, step: int) -> bool:
        """Whether the layer's next ghost wakes at this check."""
        assert self.saturation is not None
        above = self.saturation[number] > self.config.threshold
        self.streak[number] = self.streak[number] + 1 if above else 0
        asleep = len(self.woken_at[number]) < len(self.layers[number].ghosts)
        late = step + 1 >= self.config.min_step
        return asleep and late and self.streak[number] >= self.config.patience

    def _wake(self, number: int, step: int) -> Awakening:
        assert self.saturation is not None
        layer, ghost = self.layers[number], len(self.woken_at[number])
        self.woken_at[number].append(step)
        self.streak[number] = 0
        forget(self.engine, layer.ghost_parameters(ghost))
        if layer.config.ghosts.background and ghost + 1 < len(layer.ghosts):
            # taught from now on; DeepSpeed, unlike torch, counted steps that had no gradient for it
            forget(self.engine, layer.ghost_parameters(ghost + 1))
        return Awakening(number, ghost, self.saturation[number])

    def state_dict(self) -> dict[str, Any]:
        return {"saturation": self.saturation, "streak": self.streak, "woken_at": self.woken_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saturation, self.streak = state["saturation"], list(state["streak"])
        self.woken_at = [list(own) for own in state["woken_at"]]


def ghost_learning_rate(form: str, rate: float, peak: float) -> float:
    """Learning rate of a ghost that is fully awake; the forms are those of
    `GhostScheduleConfig.learning_rate`."""
    share = rate / peak
    forms = {"inverse": 1 - share, "complementary": 0.5 * (1 - share) + 0.1, "same": share}
    return peak * forms[form]
