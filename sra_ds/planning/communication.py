"""Bytes a process hands to collectives in one optimizer step, from closed forms.

A byte is one of the tensor a process passes in, per call: for an all-reduce or reduce the tensor, for an
all-gather its own part, for a reduce-scatter or all-to-all all that it gives away, its own share
included. So a count does not depend on what the library does with it; `wire_bytes` is what a ring makes
of it. A group of one process sends nothing. All-to-alls of tokens are means over the processes, since
each one's depend on the routing; their sum does not. DeepSpeed 0.19.8, A micro-batches a step, n
processes per group:

    stage   gradients                               parameters
    0       all-reduce N                            -
    1       all-reduce N, or reduce N               all-gather N / n, padded
    2       A x the same                            all-gather N / n, padded
    3       A x reduce-scatter N, padded            A x (1 or 2) x all-gather N / n, padded

    experts over ep processes: A x L x (4 all-to-alls of T K D numbers, one of E counts)
    small parameters at stage 3: gathered once a step

Stages 1 and 2 all-reduce by default, which sends twice what a reduce to the owner needs
(`use_multi_rank_bucket_allreduce`). Besides these there are flags and norms of single numbers ("control",
at most `CONTROL_BYTES` per optimizer group), and what the training loop exchanges itself.
"""

from typing import NamedTuple

from sra_ds.config.losses import NoTerm
from sra_ds.config.model import MoEChannelConfig
from sra_ds.planning.case import Case
from sra_ds.planning.shapes import optimizer_groups

COUNT_BYTES, STATISTIC_BYTES, MEAN_BYTES, FLAG_BYTES = 4, 4, 8, 4
CONTROL_BYTES = 64
"""Bound on the bytes of overflow flags and norms per optimizer group and step."""
RING_FACTORS = {"all_reduce": 2, "reduce": 1, "reduce_scatter": 1, "all_to_all": 1}


class Transfer(NamedTuple):
    """A kind of collective of one step: what it is for, which operation, bytes given to it, over how many
    processes, how many calls, and whether those processes share one set of experts (and so are
    neighbours) or are spread over all nodes."""

    purpose: str
    operation: str
    bytes: float
    processes: int
    calls: int
    neighbours: bool = False

    @property
    def wire_bytes(self) -> float:
        """Bytes each process sends when the operation runs as a ring: an all-reduce of S bytes sends
        2 S (n - 1) / n, an all-gather of own parts of s bytes s (n - 1), the others S (n - 1) / n."""
        others = self.processes - 1
        if self.operation == "all_gather":
            return self.bytes * others
        return RING_FACTORS[self.operation] * self.bytes * others / self.processes


def step_transfers(case: Case) -> list[Transfer]:
    """Everything one process sends for one optimizer step but control."""
    if case.zero.stage == 3:
        found = [*_reduce_scatter(case), *parameter_gathers(case)]
    else:
        found = [*_reductions(case), *(_updates(case) if case.zero.stage else [])]
    found += [*_expert_rows(case), *_statistics(case)]
    return [transfer for transfer in found if transfer.processes > 1 and transfer.bytes > 0]


def total_bytes(transfers: list[Transfer], purpose: str) -> float:
    """Bytes given to all collectives for one purpose."""
    return sum(transfer.bytes for transfer in transfers if transfer.purpose == purpose)


def _by_group_size(case: Case) -> dict[int, list[int]]:
    """Elements of the parameters held here by the number of processes that hold the same ones."""
    found: dict[int, list[int]] = {}
    for weight in case.shapes.weights:
        found.setdefault(case.layout.sharing(weight), []).append(case.layout.held(weight))
    return found


def _reductions(case: Case) -> list[Transfer]:
    """Gradients at stages 0 to 2; stage 2 reduces every micro-batch's."""
    zero = case.zero
    operation = "all_reduce" if zero.stage == 0 or zero.reduce_to_all else "reduce"
    times = case.accumulation if zero.stage == 2 else 1
    found = []
    for processes, numels in _by_group_size(case).items():
        buckets = -(-sum(numels) // zero.reduce_bucket)
        calls = times * buckets * (processes if operation == "reduce" else 1)
        size = times * sum(numels) * case.width
        found.append(Transfer("gradients", operation, size, processes, calls))
    return found


def _updates(case: Case) -> list[Transfer]:
    """Each process's updated part of the flat parameters, one call per optimizer group."""
    return [
        Transfer("parameters", "all_gather", group.partition * case.width, group.processes, 1)
        for group in optimizer_groups(case.shapes, case.layout)
    ]


def _reduce_scatter(case: Case) -> list[Transfer]:
    """Gradients at stage 3, each padded to a multiple of its processes."""
    found = []
    for processes, numels in _by_group_size(case).items():
        padded = sum(_part(numel, processes) * processes for numel in numels)
        calls = case.accumulation * sum(-(-run // case.zero.reduce_bucket) for run in case.runs())
        size = case.accumulation * padded * case.width
        found.append(Transfer("gradients", "reduce_scatter", size, processes, calls))
    return found


def parameter_gathers(case: Case) -> list[Transfer]:
    """Parameters at stage 3 once DeepSpeed knows the order of use (from the third step on): small ones
    once after the update, the others for every forward pass and, where they were not kept, again for the
    backward pass."""
    found: dict[int, tuple[int, int]] = {}
    for module, times in zip(case.shapes.modules, uses(case), strict=True):
        for weight in module:
            numel, processes = case.layout.held(weight), case.layout.sharing(weight)
            small = numel <= case.zero.persistence
            repeated = 1 if small else times * case.accumulation
            size, calls = found.get(processes, (0, 0))
            size += repeated * _part(numel, processes) * case.width
            found[processes] = (size, calls + repeated)
    return [
        Transfer("parameters", "all_gather", size, processes, calls)
        for processes, (size, calls) in found.items()
    ]


def uses(case: Case) -> list[int]:
    """How often stage 3 gathers each module's parameters for one micro-batch.

    After a module's forward pass its parameters stay if fewer than `reuse_distance` elements come before
    their next use: twice those of all later modules and of the head. The table of the embedding is used
    four times: there, by the head forwards and backwards, and there again. What is fetched ahead is kept
    too, so the forms are exact with a prefetch of 0 or a reuse distance beyond the model.
    """
    held, window = case.layout.held, case.zero.reuse_distance
    own = [sum(held(weight) for weight in module) for module in case.shapes.modules]
    table = held(case.shapes.modules[0][0])
    later = sum(own[1:])
    counts = [1 + 2 * (later >= window) + (window <= 0)]
    for numel in own[1:]:
        later -= numel
        counts.append(1 + (2 * (later + table) >= window))
    return counts


def _part(numel: int, processes: int) -> int:
    return -(-numel // processes)


def _expert_rows(case: Case) -> list[Transfer]:
    """Tokens to the experts' processes and back, forwards and backwards; checkpointing repeats the
    forward ones."""
    model, ep = case.recipe.model, case.layout.ep
    if ep == 1 or not isinstance(model.channel, MoEChannelConfig):
        return []
    again = case.recipe.training.activation_checkpointing
    times = case.accumulation * model.layers
    exchanges, counts = (6 if again else 4) * times, (2 if again else 1) * times
    rows = exchanges * case.tokens * model.channel.top_k * model.width * case.width
    numbers = counts * model.channel.experts * COUNT_BYTES
    return [
        Transfer("expert rows", "all_to_all", rows, ep, exchanges, True),
        Transfer("expert counts", "all_to_all", numbers, ep, counts, True),
    ]


def _statistics(case: Case) -> list[Transfer]:
    """Load and probability of each expert and the number of tokens, of all layers at once."""
    model, times = case.recipe.model, case.accumulation
    if not isinstance(model.channel, MoEChannelConfig):
        return []
    size = model.layers * (2 * model.channel.experts + 1) * STATISTIC_BYTES
    return [Transfer("routing statistics", "all_reduce", times * size, case.layout.world, times)]


def loop_transfers(case: Case) -> list[Transfer]:
    """What the training loop adds to a step: the mean of each loss, and whether to stop."""
    losses, world = case.recipe.losses, case.layout.world
    terms = [not isinstance(t, NoTerm) for t in (losses.balance, losses.dispersion)]
    means = 2 + sum(terms) + (losses.z_weight > 0)
    return [
        Transfer("mean losses", "all_reduce", means * MEAN_BYTES, world, 1),
        Transfer("stop flag", "all_reduce", FLAG_BYTES, world, 1),
    ]
