"""The benchmarks of whole steps by their real command, on a tiny model and its dense twin."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import RECIPE, ROOT, call
from sra_ds.config.loading import merge

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """tools/bench.py on the two recipes; its JSON."""
    recipe = merge(RECIPE, {"data": {"train": ["text.jsonl"]}})
    dense = {**recipe, "name": "tiny-dense", "losses": {}}
    feed_forward = {"kind": "gelu", "hidden": 64, "dropout": 0.0}
    channel = {"kind": "dense", "feed_forward": feed_forward}
    dense["model"] = {**recipe["model"], "channel": channel}
    files = [tmp_path / "tiny.yaml", tmp_path / "dense.yaml"]
    for file, content in zip(files, (recipe, dense), strict=True):
        file.write_text(yaml.safe_dump(content), "utf-8")

    def run(what: str, *arguments: object) -> dict[str, Any]:
        tool = ROOT / "tools" / "bench.py"
        rounds = () if what == "memory" else ("--rounds", 1)
        given = (what, "--recipes", *files, *rounds, "--json", *arguments)
        result = call(sys.executable, tool, *given, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


def test_step_tells_ratios_of_recipes_and_of_engines(bench: Bench) -> None:
    found = bench("step", "--stages", "0", "2")
    assert set(found["milliseconds"]) == {
        "tiny/torch",
        "tiny-dense/torch",
        "tiny/zero0",
        "tiny/zero2",
    }
    (plain,), (dense,) = (found["all_milliseconds"][f"{n}/torch"] for n in ("tiny", "tiny-dense"))
    assert found["moe_over_dense"] == pytest.approx(plain / dense)
    assert set(found["engine_over_plain"]) == {"zero0", "zero2"}
    assert found["tokens_per_step"] == 8 * 32


def test_backends_stand_beside_the_dense_twin(bench: Bench) -> None:
    found = bench("backends", "--batch", 2)
    rows = found["variants"]
    assert {"tiny/local", "tiny/deepspeed", "tiny-dense/dense"} <= set(rows)
    assert found["tokens_per_step"] == 2 * 32
    assert rows["tiny-dense/dense"]["over_dense"] == 1.0
    for row in rows.values():
        speed = 1e3 * found["tokens_per_step"] / row["milliseconds"]
        assert row["tokens_per_second"] == pytest.approx(speed)
        assert row["mfu"] > 0


def test_memory_is_measured_in_fresh_processes(bench: Bench) -> None:
    found = bench("memory", "--micro-batch", 3)
    assert set(found) == {"torch", "2"}
    for one in found.values():
        assert one["micro_batch_size"] == 3
        assert one["peak_bytes"] > one["peak_bytes_before_model"] > 0


def test_two_processes_are_timed_against_one(bench: Bench) -> None:
    found = bench("scaling")
    speeds = found["tokens_per_second"]
    assert found["windows_per_process"] == 8
    assert found["two_over_one"] == pytest.approx(speeds["2"] / speeds["1"])
