"""One way to run a recipe, as all closed forms take it."""

from typing import NamedTuple

from sra_ds.config import Recipe
from sra_ds.config.model import MoEChannelConfig
from sra_ds.planning.shapes import Layout, Shapes
from sra_ds.planning.zero import Zero


class Case(NamedTuple):
    """`windows` per micro-batch and process, `accumulation` micro-batches per step, `width` bytes of a
    number in the model's precision (2 for bf16)."""

    recipe: Recipe
    shapes: Shapes
    layout: Layout
    zero: Zero
    windows: int
    accumulation: int = 1
    width: int = 2
    device: str = "cuda"
    """"cpu" has no fused attention with dropout, keeps dropout masks as numbers, has pages only for what
    is written, and gloo, which reduces copies."""
    compiled: bool = False
    """Whether cosine routing and, on a CPU, experts without dropout and products of blocks run compiled,
    which keeps less."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one process."""
        return self.windows * self.recipe.data.sequence_length

    @property
    def step_tokens(self) -> int:
        """Of a step on all processes."""
        return self.tokens * self.accumulation * self.layout.world

    @property
    def rows_per_expert(self) -> float | None:
        """Rows one expert sees of a micro-batch, those of all processes that share it."""
        channel = self.recipe.model.channel
        if not isinstance(channel, MoEChannelConfig):
            return None
        return self.tokens * channel.top_k * self.layout.ep / channel.experts

    def runs(self) -> list[int]:
        """Elements of parameters that lie together in forward order and are shared by the same processes:
        what stage 3 can reduce at once."""
        found: list[int] = []
        last = 0
        for weight in self.shapes.weights:
            sharing = self.layout.sharing(weight)
            if sharing != last:
                found.append(0)
            found[-1] += self.layout.held(weight)
            last = sharing
        return found
