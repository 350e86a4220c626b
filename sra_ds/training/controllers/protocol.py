"""What a controller is, what it sees of a step, and what it may tell of it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sra_ds.data.loader import Batch
from sra_ds.moe.routing import Routing

BatchOf = Callable[[int], Batch]
"""Windows of a step's batch, the same on every process."""


class Event(Protocol):
    """Something to be told of a step: a line of metrics of its own, and one for the person watching."""

    @property
    def record(self) -> str:
        """Its key in the line of metrics."""

    def _asdict(self) -> dict[str, Any]:
        """What the line holds."""

    def line(self) -> str:
        """For the person watching."""


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
