"""Timing in turn: the order of works, rounds that do not count, ratios within a round."""

import pytest

from sra_ds.timing import WARM_UP, in_turn, medians, ratio, wall_clock


def test_every_work_takes_its_turn_and_the_first_rounds_do_not_count() -> None:
    order: list[object] = []
    works = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    clock = iter(range(100))

    def counting(work) -> float:
        work()
        return float(next(clock))

    times = in_turn(works, 2, counting, order.append)
    assert order == [part for number in range(WARM_UP + 2) for part in (number, "a", number, "b")]
    assert times == {"a": [4.0, 6.0], "b": [5.0, 7.0]}
    assert medians(times) == {"a": 5.0, "b": 6.0}


def test_a_ratio_is_taken_within_rounds() -> None:
    """The machine is twice as slow in the second round and four times in the third."""
    times = {"a": [2.0, 4.0, 9.0], "b": [1.0, 2.0, 4.0]}
    assert ratio(times, "a", "b") == 2.0
    assert ratio(times, "b", "a") == 0.5


def test_the_clock_counts_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((1.0, 1.25))
    monkeypatch.setattr("sra_ds.timing.time.perf_counter", lambda: next(now))
    assert wall_clock(lambda: None) == pytest.approx(250.0)
