"""What is planned for a recipe and a machine, and that it can be started."""

import json
import math
import sys

import pytest

from commands import ROOT, call
from sra_ds.config import load_recipe
from sra_ds.errors import ConfigError
from sra_ds.planning.break_even import break_even
from sra_ds.planning.communication import Transfer
from sra_ds.planning.hardware import GB, GPUS, choose_gpu, make_network, parse_memory
from sra_ds.planning.plan import Request, candidates, recommended
from sra_ds.planning.report import make_plan
from sra_ds.planning.shapes import read_shapes
from sra_ds.planning.step_time import make_machine, transfer_seconds
from sra_ds.planning.study import study
from sra_ds.planning.zero import require_planned
from sra_ds.training.ds_config import read_ds_config

CONFIGS = {p.name: read_ds_config(p) for p in sorted((ROOT / "ds_configs").glob("*.json"))}
H100 = GPUS["H100"]


def request(name: str = "sra-128e", gpus: int = 8, nodes: int = 1, memory: str = "80GB", **extra):
    network = make_network(gpus, nodes, H100, None, None)
    overrides = extra.pop("overrides", ())
    machine = make_machine(H100, network, 0.35)
    recipe = load_recipe(name, list(overrides))
    return Request(recipe, machine, parse_memory(memory), recipe_name=name, **extra)


def test_every_configuration_and_size_is_planned_once():
    found = candidates(request(), CONFIGS)
    pairs = [(candidate.config, candidate.ep) for candidate in found]
    assert sorted(pairs) == sorted((name, ep) for name in CONFIGS for ep in (1, 2, 4, 8))
    refused = {(c.config, c.ep) for c in found if c.refused}
    assert refused == {("zero0.json", ep) for ep in (2, 4, 8)}
    assert all(c.memory.peak <= H100.usable(80e9) for c in found if c.fits)


def test_the_recommended_one_is_the_fastest_that_fits():
    found = candidates(request("sra-8b", 64, 8), CONFIGS)
    best = recommended(found)
    fitting = [candidate for candidate in found if candidate.fits]
    assert best.time.conservative == min(candidate.time.conservative for candidate in fitting)


def test_less_memory_gives_smaller_micro_batches_then_recomputation_then_nothing():
    sizes = []
    for memory in ("80GB", "24GB", "16GB", "8GB", "2GB"):
        best = recommended(candidates(request("sra-1b", 8, memory=memory), CONFIGS))
        sizes.append(
            best and (best.case.windows, best.case.recipe.training.activation_checkpointing)
        )
    assert sizes[-1] is None
    windows = [size[0] for size in sizes[:-1]]
    assert windows == sorted(windows, reverse=True) and windows[0] > windows[-1]
    assert make_plan(request("sra-8b", 8, memory="4GB"), CONFIGS)["recommendation"] is None


def test_the_recommended_command_is_accepted(tmp_path):
    """The dry run of the command finds nothing to object to."""
    found = make_plan(request("sra-128e", 1, memory="24GB"), CONFIGS)["recommendation"]
    words = found["command"].split()
    start = words.index("launch/train.py")
    assert words[:start] == ["deepspeed", "--num_gpus", "1"]
    result = call(sys.executable, *words[start:], "--dry-run", "--run", tmp_path / "run", cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_days_and_cost_follow_from_the_budget():
    plan = make_plan(request(budget=1e9, price=2.0), CONFIGS)
    best = plan["recommendation"]
    fast, slow = best["seconds_per_step"]["optimistic"], best["seconds_per_step"]["conservative"]
    steps = 1e9 / plan["tokens_per_step"]
    assert best["days"] == pytest.approx([steps * fast / 86_400, steps * slow / 86_400])
    assert best["cost"] == pytest.approx([day * 24 * 8 * 2.0 for day in best["days"]])


def test_the_threshold_of_compute_is_where_products_take_as_long_as_reading():
    rows, weights = H100.compute_bound_rows(2), 1e6
    assert 2 * rows * weights / H100.bf16 == pytest.approx(2 * weights / H100.bandwidth)
    assert rows == pytest.approx(989e12 / 3350e9)


@pytest.mark.parametrize("ep", [2, 8])
def test_both_ways_send_the_same_at_the_break_even(ep):
    recipe = load_recipe("sra-128e")
    found = break_even(recipe, read_shapes(recipe), 8, ep, 2)
    per_token = found.all_to_all / found.tokens_per_gpu
    at = found.equal_at_tokens_per_gpu * per_token
    assert found.all_reduce_spread + at == pytest.approx(found.all_reduce_copied)
    experts = sum(weight.numel for weight in read_shapes(recipe).weights if weight.expert)
    layers, k, width = recipe.model.layers, recipe.model.channel.top_k, recipe.model.width
    assert found.equal_at_tokens_per_gpu == pytest.approx(experts / (2 * layers * k * width))


def test_a_ring_over_nodes_shares_their_ports():
    """64 processes, 8 a node: 800 MB all-reduced pass 2 x 63/64 of them through 8 ports of 50 GB/s, never
    faster than the links inside; alone in its node each has one port."""
    network = make_network(64, 8, H100, None, None)
    everyone = Transfer("gradients", "all_reduce", 8e8, 64, 0)
    spread = Transfer("gradients", "all_reduce", 8e8, 8, 0)
    assert transfer_seconds(everyone, network) == pytest.approx(everyone.wire_bytes / 400e9)
    assert transfer_seconds(spread, network) == pytest.approx(spread.wire_bytes / 50e9)
    assert transfer_seconds(spread._replace(neighbours=True), network) == pytest.approx(
        spread.wire_bytes / 450e9
    )
    called = everyone._replace(calls=3)
    hops = transfer_seconds(called, network) - transfer_seconds(everyone, network)
    assert hops == pytest.approx(3 * math.log2(64) * 10e-6)


def test_an_all_to_all_is_limited_by_what_leaves_the_node():
    network = make_network(16, 2, H100, None, None)
    rows = Transfer("expert rows", "all_to_all", 16e9, 16, 0, neighbours=True)
    assert transfer_seconds(rows, network) == pytest.approx(8e9 / 50e9)


def test_options_the_formulas_do_not_describe_are_refused():
    for option in ({"zero_quantized_weights": True}, {"zero_hpz_partition_size": 8}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            require_planned({"zero_optimization": {"stage": 3, **option}}, "my.json")


@pytest.mark.parametrize(
    ("text", "bytes"), [("24GB", 24e9), ("80 gb", 80e9), ("24GiB", 24 * 2**30), ("0.5TB", 5e11)]
)
def test_memory_is_given_with_its_unit(text, bytes):
    assert parse_memory(text) == bytes


def test_an_unnamed_gpu_is_the_usual_one_of_its_memory():
    names = [choose_gpu(None, gb * GB).name for gb in (16, 24, 48, 80, 141, 192)]
    assert names == ["RTX 4090", "RTX 4090", "A100 40GB", "H100", "H200", "H200"]


def test_the_published_study_is_what_the_formulas_say():
    recipes = [load_recipe(name) for name in ("sra-128e", "sra-1b", "sra-8b")]
    found = study(recipes, CONFIGS)
    folder = ROOT / "docs" / "results" / "scaling"
    assert json.loads((folder / "study.json").read_text("utf-8")) == json.loads(json.dumps(found))
    tables = (folder / "study.md").read_text("utf-8")
    shown = (ROOT / "docs" / "scaling.md").read_text("utf-8").splitlines()
    rows = [line for line in shown if line.startswith("| `sra-")]
    assert rows and all(row in tables for row in rows)


def plan(*arguments: object):
    return call(sys.executable, ROOT / "tools" / "plan.py", *arguments)


def test_the_tool_prints_a_table_and_a_command():
    result = plan("--recipe", "sra-128e", "--gpus", 8, "--gpu", "H100", "--gpu-memory", "80GB")
    assert result.returncode == 0, result.stderr
    for part in ("zero3_offload", "rows/expert", "all-to-all", "equal at", "launch/train.py"):
        assert part in result.stdout
    whole = plan("--recipe", "sra-128e", "--gpus", 8, "--json")
    assert len(json.loads(whole.stdout)["candidates"]) == len(CONFIGS) * 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gpus", 3], ["training.batch_size=128", "3 GPUs", "training.batch_size=129"]),
        (["--gpus", 8, "--nodes", 3], ["--gpus 8", "--nodes 3"]),
        (["--gpu-memory", "24"], ["--gpu-memory 24", "24GB"]),
        (["--gpu", "B9000"], ["--gpu B9000", "H200"]),
        (["--efficiency", 35], ["--efficiency 35"]),
        (["--gpus", 8, "parallel.expert_parallel_size=3"], ["expert_parallel_size=3", "1, 2, 4, 8"]),
        (["--gpus", 0], ["--gpus"]),
    ],
)  # fmt: skip
def test_wrong_input_is_named_in_one_line(arguments, named):
    result = plan("--recipe", "sra-128e", *arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert all(part in last for part in named), last
