"""When spreading experts over processes sends less than copying them, in bytes a GPU sends per step.

As rings: copied on all n processes, the X numbers of all experts are all-reduced, 2 X (n - 1) / n. Over
ep of them each copies X / ep over m = n / ep, 2 (X / ep) (m - 1) / m, and every token of a GPU's step
sends 4 L K D (ep - 1) / ep numbers: to its experts and back, forwards and backwards. The first grows with
the model, the second with the tokens; they are equal at X / (2 L K D) tokens, whatever n and ep.

Only gradients, reduced once a step, are compared: as at stage 0. Stages 1 and 2 also all-gather updated
parameters, copied or spread, so that 3 X stands for 2 X everywhere and the break-even is at 1.5 times as
many tokens; and stages 2 and 3 reduce once per micro-batch.
"""

from typing import NamedTuple

from sra_ds.config import Recipe
from sra_ds.config.model import MoEChannelConfig
from sra_ds.planning.shapes import Shapes


class BreakEven(NamedTuple):
    """Bytes per GPU and step at `tokens_per_gpu`, and the tokens at which both ways send the same."""

    expert_parallel_size: int
    all_reduce_copied: float
    all_reduce_spread: float
    all_to_all: float
    tokens_per_gpu: float
    equal_at_tokens_per_gpu: float


def break_even(recipe: Recipe, shapes: Shapes, world: int, ep: int, width: int) -> BreakEven:
    """Experts on every process against experts over `ep` of them; numbers have `width` bytes."""
    model = recipe.model
    assert isinstance(model.channel, MoEChannelConfig)
    experts = sum(weight.numel for weight in shapes.weights if weight.expert) * width
    copies = world // ep
    copied = 2 * experts * (world - 1) / world
    spread = 2 * experts / ep * (copies - 1) / copies
    per_token = 4 * model.layers * model.channel.top_k * model.width * width * (ep - 1) / ep
    tokens = recipe.training.batch_size * recipe.data.sequence_length / world
    return BreakEven(ep, copied, spread, tokens * per_token, tokens, (copied - spread) / per_token)
