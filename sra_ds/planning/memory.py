"""Memory of one process during training, from closed forms of what DeepSpeed 0.19.8 allocates.

A step has three moments that can be its largest: the end of the forward pass (all activations and the
head's logits), the backward pass (activations turn into gradients), and the update (gradients once more,
flat and in float32). The peak is the largest of the three, not the sum of the parts. Per element, w bytes
of a parameter and n processes that share it:

    stage   parameters        optimizer      gradients                     update
    0       w                 8 (Adam)       w                             -
    1       w                 12 / n         w, reduced ones w / n         4 / n (+ w / n)
    2       w                 12 / n         w / n and two buckets         4 / n (+ w / n)
    3       w / n, gathered   12 / n         w / n and two buckets         4 / n (+ w / n)

From stage 1 on 4 of the 12 bytes are the float32 master copy. "Reduced ones" are kept whole: a process
holds every parameter that its partition touches. All of it is for the second step and later.
"""

from typing import NamedTuple

from sra_ds.config import Recipe
from sra_ds.config.training import AdamWConfig, OptimizerConfig
from sra_ds.planning.activations import Activations, Setting, activation_bytes
from sra_ds.planning.shapes import Group, Layout, Shapes, optimizer_groups
from sra_ds.planning.zero import Zero

FLOAT, DOUBLE = 4, 8
WHOLE_REDUCTION = 500_000_000
"""Elements of the buckets that DeepSpeed reduces at stage 0."""


class Memory(NamedTuple):
    """Bytes on the device by what they hold, each at its own largest; the peak of each moment of a step;
    and bytes in the host's memory (offloading; the model before it is moved to the device)."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    logits: int
    moments: dict[str, int]
    host: int

    @property
    def peak(self) -> int:
        """The largest moment."""
        return max(self.moments.values())


class _Held(NamedTuple):
    """Elements, summed over parameters, of one process."""

    whole: int
    """Before ZeRO partitions them."""
    padded: int
    partition: int
    largest_partition: int
    """Of an optimizer group; at stage 3 of a sub-group."""
    touched: int
    """Whole parameters that overlap this process's partitions, at most."""
    largest: int
    """Elements of the largest parameter."""


def estimate(
    recipe: Recipe, shapes: Shapes, layout: Layout, zero: Zero, setting: Setting, accumulation: int
) -> Memory:
    """Memory of one process."""
    held = _held(shapes, layout, zero)
    activations = activation_bytes(recipe, setting)
    states = _states(recipe.training.optimizer) * FLOAT
    w = setting.width
    if zero.stage == 0:
        return _replicated(held, activations, states, setting, layout, accumulation)
    build = _sharded if zero.stage == 3 else _partitioned
    memory = build(held, activations, states + FLOAT, setting, zero, accumulation)
    if zero.stage == 3:
        gathered = gathered_elements(shapes, layout, zero) * w
        moments = dict(memory.moments)
        moments["forward"] += gathered
        moments["backward"] += gathered
        memory = memory._replace(parameters=memory.parameters + gathered, moments=moments)
    return memory


def gathered_elements(shapes: Shapes, layout: Layout, zero: Zero) -> int:
    """Elements of parameters that stage 3 holds whole at once, at most: those small enough to stay, and
    of the others the window around the turn from forward to backward within which a parameter is used
    again, what is fetched ahead, and the largest module. Nothing is gathered from one process."""
    small = large = biggest = 0
    for module in shapes.modules:
        own = 0
        for weight in module:
            if layout.processes(weight.expert and layout.marked) == 1:
                continue
            numel = layout.held(weight)
            if numel <= zero.persistence:
                small += numel
            else:
                own += numel
        large, biggest = large + own, max(biggest, own)
    return small + min(large, zero.reuse_distance // 2 + zero.prefetch + biggest)


def _held(shapes: Shapes, layout: Layout, zero: Zero) -> _Held:
    groups = optimizer_groups(shapes, layout)
    numels = [layout.held(weight) for weight in shapes.weights]
    largest_partition = max(group.partition for group in groups)
    if zero.stage == 3:
        largest_partition = min(largest_partition, zero.sub_group + max(numels))
    return _Held(
        whole=sum(numels),
        padded=sum(group.padded for group in groups),
        partition=sum(group.partition for group in groups),
        largest_partition=largest_partition,
        touched=sum(_touched(group) for group in groups),
        largest=max(numels),
    )


def _touched(group: Group) -> int:
    """Elements of whole parameters that overlap one partition, for the process with the most."""
    most, size = 0, group.partition
    ends = [0]
    for numel in group.numels:
        ends.append(ends[-1] + numel)
    for rank in range(group.processes):
        low, high = rank * size, (rank + 1) * size
        spans = zip(ends, ends[1:], strict=False)
        most = max(most, sum(end - at for at, end in spans if at < high and end > low))
    return most


def _states(config: OptimizerConfig) -> int:
    """Numbers the optimizer keeps per parameter."""
    if isinstance(config, AdamWConfig):
        return 2
    return 1 if config.momentum > 0 else 0


def _bucket(held: _Held, zero: Zero, setting: Setting) -> int:
    """Bytes of one gradient bucket; on the CPU pages that are never written do not exist."""
    elements = min(zero.reduce_bucket, held.whole) if setting.device == "cpu" else zero.reduce_bucket
    return elements * setting.width


def _replicated(
    held: _Held, kept: Activations, states: int, setting: Setting, layout: Layout, accumulation: int
) -> Memory:
    w = setting.width
    parameters, optimizer, gradients = held.whole * w, held.whole * states, held.whole * w
    buffers = min(WHOLE_REDUCTION, held.whole) * w if layout.world > 1 else 0
    always = parameters + optimizer
    moments = {
        "forward": always + kept.kept + kept.logits + (gradients if accumulation > 1 else 0),
        "backward": always + gradients + max(kept.layer, buffers),
        "update": always + gradients,
    }
    host = 0 if setting.device == "cpu" else held.whole * FLOAT
    return Memory(
        parameters, gradients, optimizer, buffers, kept.kept, kept.logits, moments, host
    )  # fmt: skip


def _partitioned(
    held: _Held, kept: Activations, states: int, setting: Setting, zero: Zero, accumulation: int
) -> Memory:
    """Stages 1 and 2: a bucket is filled, copied flat, reduced, and what the partition needs of it kept."""
    w, bucket = setting.width, _bucket(held, zero, setting)
    parameters, optimizer = held.padded * w, held.partition * states
    own = held.touched * w
    gradients = own if zero.stage == 2 else max(held.whole * w, own)
    between = 0
    if accumulation > 1:
        between = gradients
    copied = max(min(zero.reduce_bucket, held.whole), min(held.largest, 2 * zero.reduce_bucket)) * w
    buffers = zero.buckets * bucket + copied
    flat = held.largest_partition * (FLOAT + (w if w < FLOAT else 0))
    norm = min(held.largest, held.largest_partition) * DOUBLE
    host = 0 if setting.device == "cpu" else held.whole * FLOAT
    if zero.optimizer_on_host:
        host += held.partition * (states + FLOAT + w)
        optimizer, own, flat, norm = 0, 0, held.largest * w, held.largest * w
    always = parameters + optimizer
    moments = {
        "forward": always + kept.kept + kept.logits + between,
        "backward": always + gradients + buffers + (kept.layer if zero.stage == 2 else 0)
        + (between if zero.stage == 2 else 0),
        "update": always + own + max(flat, norm),
    }  # fmt: skip
    return Memory(
        parameters, gradients, optimizer, buffers, kept.kept, kept.logits, moments, host
    )


def _sharded(
    held: _Held, kept: Activations, states: int, setting: Setting, zero: Zero, accumulation: int
) -> Memory:
    """Stage 3: parameters and gradients are partitioned, too; the bucket stays for the whole run."""
    del accumulation
    w, bucket = setting.width, _bucket(held, zero, setting)
    parameters, optimizer = held.partition * w, held.partition * states
    gradients = held.partition * w
    copied = max(bucket, held.largest * w)
    flat = held.largest_partition * (FLOAT + (w if w < FLOAT else 0))
    norm = min(held.largest, held.largest_partition) * DOUBLE
    host = 0 if setting.device == "cpu" else held.whole * FLOAT
    if zero.optimizer_on_host:
        host += optimizer + gradients + held.partition * FLOAT
        optimizer, gradients, flat, norm = 0, 0, 0, 0
    if zero.parameters_on_host:
        host, parameters = host + parameters, 0
    always = parameters + optimizer + gradients + bucket
    moments = {
        "start": held.whole * w + parameters + optimizer,
        "forward": always + kept.kept + kept.logits,
        "backward": always + copied + kept.layer,
        "update": always + max(flat, norm),
    }
    return Memory(
        parameters, gradients, optimizer, bucket + copied, kept.kept, kept.logits, moments, host
    )
