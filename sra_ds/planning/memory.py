"""Memory of one process during training, from closed forms of what DeepSpeed 0.19.8 allocates.

A step has three moments that can be its largest: the end of the forward pass (all activations and the
head's logits), the backward pass (activations turn into gradients, gradients are reduced), and the update
(gradients once more, flat and in float32). The peak is the largest of them, not the sum of the parts.
Bytes per element, for w bytes of a parameter that n processes share, with Adam:

    stage   parameters        optimizer   gradients                          update
    0       w                 8           w, and flat once more to reduce    -
    1       w                 12 / n      w, and a bucket                    4 / n (+ w / n unless w = 4)
    2       w                 12 / n      w / n, and a bucket                the same
    3       w / n, gathered   12 / n      w / n, and a bucket                the same

From stage 1 on 4 of the 12 are the float32 master copy. A bucket that several processes reduce is copied
flat first. Stages 1 and 2 keep the gradient of every whole parameter that a process's partition touches,
so stacked experts count whole where a partition is smaller than they are. All of it is for the second
step and later.
"""

from typing import NamedTuple

from sra_ds.config.training import AdamWConfig, OptimizerConfig
from sra_ds.planning.activations import Activations, activation_bytes
from sra_ds.planning.case import Case
from sra_ds.planning.shapes import optimizer_groups

FLOAT, DOUBLE = 4, 8
WHOLE_REDUCTION = 500_000_000
"""Elements after which DeepSpeed reduces what it has flattened, at stage 0."""


class Memory(NamedTuple):
    """Bytes on the device by what they hold, each at its own largest; the peak of each moment; and bytes
    in the host's memory: what is offloaded, and the model before it is moved to the device."""

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
    """Elements on one process, summed over its parameters."""

    whole: int
    """Before ZeRO partitions them."""
    padded: int
    """In the flat buffers of stages 1 and 2."""
    partition: int
    updated: int
    """Of the partition, updated at a time: an optimizer group, at stage 3 a sub-group."""
    touched: int
    """Of whole parameters that overlap the partition, for the process with the most."""
    largest: int
    """Of one parameter."""
    shared: int
    """Of parameters that other processes hold, too."""
    run: int
    """Of parameters with the same group of processes, one after another in forward order."""


def estimate(case: Case) -> Memory:
    """Memory of one process."""
    build = {0: _replicated, 3: _sharded}.get(case.zero.stage, _partitioned)
    return build(case, _held(case), activation_bytes(case))


class Gathered(NamedTuple):
    """Elements of parameters that stage 3 holds whole at once, at most, and of those that arrive in one
    flat buffer, which lives until the last of them is used."""

    whole: int
    flat: int


def gathered_elements(case: Case) -> Gathered:
    """Parameters small enough to stay, and of the others the last ones before the turn from forward to
    backward that are used again soon enough, what is fetched ahead, and the largest module. One process
    alone gathers nothing, but fetches what is offloaded, parameter by parameter."""
    fetched = case.zero.parameters_on_host and case.device != "cpu"
    small = large = module = parameter = 0
    for weights in case.shapes.modules:
        numels = [case.layout.held(w) for w in weights if fetched or case.layout.sharing(w) > 1]
        big = [numel for numel in numels if numel > case.zero.persistence]
        small += sum(numels) - sum(big)
        large += sum(big)
        module, parameter = max(module, sum(big)), max(parameter, *big, 0)
    ahead = case.zero.prefetch + module
    whole = small + min(large, case.zero.reuse_distance // 2 + ahead)
    flat = min(large, max(case.zero.prefetch + parameter, module))
    return Gathered(whole, flat if case.layout.world > 1 else 0)


def _held(case: Case) -> _Held:
    groups = optimizer_groups(case.shapes, case.layout)
    numels = [case.layout.held(weight) for weight in case.shapes.weights]
    updated = max(group.partition for group in groups)
    if case.zero.stage == 3:
        updated = min(updated, case.zero.sub_group + max(numels))
    return _Held(
        whole=sum(numels),
        padded=sum(group.padded for group in groups),
        partition=sum(group.partition for group in groups),
        updated=updated,
        touched=sum(group.touched for group in groups),
        largest=max(numels),
        shared=sum(sum(group.numels) for group in groups if group.processes > 1),
        run=max(case.runs()),
    )


def _states(config: OptimizerConfig) -> int:
    """Bytes per parameter of what the optimizer keeps."""
    if isinstance(config, AdamWConfig):
        return 2 * FLOAT
    return FLOAT if config.momentum > 0 else 0


def _flat(elements: int, case: Case) -> int:
    """Bytes of gradients made flat, and of them in float32."""
    return elements * (FLOAT + (case.width if case.width < FLOAT else 0))


def _model_on_host(case: Case, held: _Held) -> int:
    """Every process builds its model in float32 in the host's memory."""
    return 0 if case.device == "cpu" else held.whole * FLOAT


def _replicated(case: Case, held: _Held, kept: Activations) -> Memory:
    """Stage 0: gradients are copied flat, 500 million at a time, even where nothing is shared."""
    w = case.width
    parameters, gradients = held.whole * w, held.whole * w
    optimizer = held.whole * _states(case.recipe.training.optimizer)
    buffers = min(WHOLE_REDUCTION + held.largest, held.whole) * w
    always, between = parameters + optimizer, gradients if case.accumulation > 1 else 0
    moments = {
        "forward": always + between + kept.kept + kept.logits,
        "backward": always + gradients + max(kept.layer, buffers),
        "update": always + gradients,
    }
    host = _model_on_host(case, held)
    return Memory(
        parameters, gradients, optimizer, buffers, kept.kept, kept.logits, moments, host
    )  # fmt: skip


def _partitioned(case: Case, held: _Held, kept: Activations) -> Memory:
    """Stages 1 and 2: gradients move into a bucket, which is copied flat where it is shared, and reduced;
    what the partition needs of it is kept. Stage 1 does so at the end, for the gradients of the step."""
    w, zero, several = case.width, case.zero, case.accumulation > 1
    parameters, own = held.padded * w, held.touched * w
    optimizer = held.partition * (_states(case.recipe.training.optimizer) + FLOAT)
    bucket = zero.buckets * _written(case, zero.reduce_bucket, held.whole) * w
    copied = (
        min(held.shared, max(zero.reduce_bucket, min(held.largest, 2 * zero.reduce_bucket))) * w
    )
    if zero.stage == 1:
        gradients = between = max(held.whole * w, own)
        backward = gradients + copied + max(0, bucket - gradients)
    else:
        gradients, between = own, own
        backward = bucket + kept.layer + (own if several else 0) + _reducing(case, held, copied)
    update = own + max(_flat(held.updated, case), min(held.largest, held.updated) * DOUBLE)
    host = _model_on_host(case, held)
    if zero.optimizer_on_host:  # gradients pass through one buffer on their way
        host += optimizer + held.partition * (FLOAT + w) + held.largest * w
        host += own if several else 0  # gradients between micro-batches
        optimizer, update = 0, held.largest * w
        if zero.stage == 2:
            gradients, between = held.largest * w, 0
            backward = bucket + copied + kept.layer + gradients
    always = parameters + optimizer
    moments = {
        "forward": always + kept.kept + kept.logits + (between if several else 0),
        "backward": always + backward,
        "update": always + update,
    }
    buffers = bucket + copied
    return Memory(
        parameters, gradients, optimizer, buffers, kept.kept, kept.logits, moments, host
    )  # fmt: skip


def _reducing(case: Case, held: _Held, copied: int) -> int:
    """Bytes of a bucket's flat copy and of the gradients kept before it. On the CPU the latter fill up
    bucket by bucket, so that either the last full bucket or the rest after it needs more."""
    own, size = held.touched * case.width, case.zero.reduce_bucket
    if case.device != "cpu":
        return own + copied
    rest = held.whole % size * case.width if held.whole > size else 0
    before = max(0, held.whole - size) * own // held.whole
    return max(before + copied, own + min(rest, copied))


def _written(case: Case, reserved: int, written: int) -> int:
    """Elements of a buffer: on the CPU pages that are never written do not exist."""
    return min(reserved, written) if case.device == "cpu" else reserved


def _sharded(case: Case, held: _Held, kept: Activations) -> Memory:
    """Stage 3: parameters are gathered for use; gradients and their bucket exist for the whole run. The
    bucket is reduced when it is full or the next gradient belongs to other processes. At the start the
    whole model is on the device once, before it is partitioned."""
    w, zero = case.width, case.zero
    parameters, gradients = held.partition * w, held.partition * w
    optimizer = held.partition * (_states(case.recipe.training.optimizer) + FLOAT)
    bucket = _written(case, zero.reduce_bucket, held.run) * w
    gathered, flat = (elements * w for elements in gathered_elements(case))
    copied = max(min(zero.reduce_bucket, held.run), held.largest) * w
    copied *= 2 if case.device == "cpu" else 1  # gloo reduces a copy of its own
    update = max(_flat(held.updated, case), min(held.largest, held.updated) * DOUBLE)
    host = _model_on_host(case, held)
    if zero.optimizer_on_host:
        host += optimizer + gradients + held.partition * FLOAT
        optimizer = gradients = update = 0
    if zero.parameters_on_host:
        host, parameters = host + parameters, 0
    always = parameters + gradients + optimizer + bucket
    moments = {
        "start": held.whole * w + parameters + optimizer,
        "forward": always + gathered + kept.kept + max(kept.logits, flat),
        "backward": always + gathered + copied + kept.layer,
        "update": always + update,
    }
    return Memory(
        parameters + gathered, gradients, optimizer, bucket + copied, kept.kept, kept.logits, moments,
        host,
    )  # fmt: skip
