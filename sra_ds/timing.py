"""Variants timed in turn: each once a round, in one process, so that ratios within a round can be trusted
on a machine whose speed changes.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm

WARM_UP = 2
"""Rounds before the first that counts."""

Work = Callable[[], object]
Clock = Callable[[Work], float]
"""Runs a piece of work once; its milliseconds."""
Times = dict[str, list[float]]
"""Milliseconds of each variant, by round."""


def in_turn(
    works: Mapping[str, Work],
    rounds: int,
    clock: Clock | None = None,
    renew: Callable[[int], object] = lambda number: None,
) -> Times:
    """Time each of the works once a round; `renew(number)` of the round comes before each of them and is
    not timed."""
    clock = clock or wall_clock
    times: Times = {name: [] for name in works}
    for number in tqdm(range(rounds + WARM_UP), "rounds", leave=False):
        for name, work in works.items():
            renew(number)
            found = clock(work)
            if number >= WARM_UP:
                times[name].append(found)
    return times


def medians(times: Times) -> dict[str, float]:
    """Milliseconds of each variant."""
    return {name: statistics.median(own) for name, own in times.items()}


def ratio(times: Times, above: str, below: str) -> float:
    """Median over rounds of the ratio within each round."""
    pairs = zip(times[above], times[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def wall_clock(work: Work) -> float:
    """By the clock, until a GPU that is in use has finished, too."""
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return 1e3 * (time.perf_counter() - start)


def device_clock(work: Work) -> float:
    """By the events of the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def recorded(work: Work) -> Work:
    """The same as a CUDA graph, so that the GPU does not wait for Python."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
