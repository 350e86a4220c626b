"""What is planned for a recipe and a machine, and that it can be started."""

import json
import math
import shlex
import sys

import pytest

from commands import ROOT, call
from sra_ds.config import load_recipe
from sra_ds.errors import ConfigError
from sra_ds.planning.break_even import break_even
from sra_ds.planning.communication import Transfer
from sra_ds.planning.hardware import GB, GPUS, choose_gpu, make_network, parse_memory
from sra_ds.planning.plan import candidates, recommended
from sra_ds.planning.report import make_plan
from sra_ds.planning.request import Options, make_request
from sra_ds.planning.shapes import read_shapes
from sra_ds.planning.step_time import transfer_seconds
from sra_ds.planning.study import study
from sra_ds.planning.table import HEAD, render
from sra_ds.planning.units import count, span
from sra_ds.planning.zero import require_planned
from sra_ds.training.ds_config import read_ds_config

CONFIGS = {p.name: read_ds_config(p) for p in sorted((ROOT / "ds_configs").glob("*.json"))}
ONE_NODE = [name for name in CONFIGS if "multinode" not in name]
H100 = GPUS["H100"]


def request(name: str = "sra-128e", gpus: int = 8, nodes: int = 1, memory: str = "80GB", **extra):
    overrides = tuple(extra.pop("overrides", ()))
    options = Options(gpus=gpus, nodes=nodes, gpu="H100", gpu_memory=memory, **extra)
    return make_request(load_recipe(name, list(overrides)), options, name, overrides)


def test_every_configuration_and_size_is_planned_once():
    for nodes, names in ((1, ONE_NODE), (2, list(CONFIGS))):
        found = candidates(request(nodes=nodes), CONFIGS)
        pairs = [(candidate.config, candidate.ep) for candidate in found]
        assert sorted(pairs) == sorted((name, ep) for name in names for ep in (1, 2, 4, 8))
        refused = {(c.config, c.ep) for c in found if c.refused}
        assert refused == {("zero0.json", ep) for ep in (2, 4, 8)}
        assert all(c.memory.peak <= H100.usable(80e9) for c in found if c.fits)


def test_the_recommended_one_is_about_the_fastest_that_fits():
    found = candidates(request("sra-8b", 64, 8), CONFIGS)
    best = recommended(found)
    fastest = min(candidate.time.conservative for candidate in found if candidate.fits)
    assert fastest <= best.time.conservative <= 1.05 * fastest
    assert best.config == "zero1_multinode.json"


def test_of_equally_fast_ones_the_simplest_is_recommended():
    """Lowest stage, then nothing offloaded, then made for several nodes, then fewest processes per set of
    experts; 6 % are a difference."""
    found = [c for c in candidates(request(nodes=2), CONFIGS) if c.fits]
    time = found[0].time._replace(compute=1, launches=0, communication=0, offload=0, update=0)
    even = [c._replace(time=time._replace(update=n / 1000)) for n, c in enumerate(found)]
    for left_out, expected in (
        ("none", "zero0"), ("zero0", "zero1_multinode"), ("zero1_", "zero1"), ("zero1", "zero2"),
        ("zero2.", "zero2_offload"), ("zero2_", "zero3_multinode"), ("zero3_m", "zero3"),
        ("zero3.", "zero3_offload"),
    ):  # fmt: skip
        even = [c for c in even if not c.config.startswith(left_out)]
        best = recommended(even)
        assert (best.config, best.ep) == (f"{expected}.json", 1)
    slower = best._replace(time=time._replace(compute=1.06))
    assert recommended([slower, even[1]._replace(time=time)]).ep == even[1].ep == 2


def test_one_node_needs_nothing_made_for_several():
    """Two RTX 4090 take sra-128e in about the same time at ZeRO 1 to 3."""
    options = Options(gpus=2, gpu="RTX 4090")
    found = candidates(make_request(load_recipe("sra-128e"), options, "sra-128e", ()), CONFIGS)
    best = recommended(found)
    assert (best.config, best.ep) == ("zero1.json", 2)


def test_less_memory_gives_slower_steps_then_nothing():
    best = [
        recommended(candidates(request("sra-1b", 8, memory=memory), CONFIGS))
        for memory in ("80GB", "24GB", "16GB", "8GB", "2GB")
    ]
    assert best[-1] is None
    seconds = [candidate.time.conservative for candidate in best[:-1]]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
    peaks = [candidate.memory.peak for candidate in best[:-1]]
    assert peaks == sorted(peaks, reverse=True)
    assert make_plan(request("sra-8b", 8, memory="4GB"), CONFIGS)["recommendation"] is None


def test_cards_hold_a_configuration_if_any_micro_batch_fits_them():
    """Asked for 80 GB or for 24 GB, the same cards are named: 41.6 GB of sra-8b's gradients and weights
    fit an 80 GB card, all its states over eight 24 GB cards do not at stage 1."""
    plans = [make_plan(request("sra-8b", 8, memory=m), CONFIGS) for m in ("80GB", "24GB")]
    by_memory = [
        {(row["config"], row["expert_parallel_size"]): row.get("fits_cards") for row in rows}
        for rows in (plan["candidates"] for plan in plans)
    ]
    assert by_memory[0] == by_memory[1]
    assert by_memory[0]["zero1.json", 1] == ["80GB", "141GB"]
    assert by_memory[0]["zero3_offload.json", 1] == ["24GB", "40GB", "80GB", "141GB"]


def test_a_node_needs_the_memory_of_what_is_offloaded():
    """One process of sra-8b with states and parameters on its host: 24 bytes of each of 8.13 G."""
    needed = 24 * 8_127_156_248
    for memory, expected in (("217GB", True), ("216GB", False)):
        found = candidates(request("sra-8b", 1, memory="24GB", host_memory=memory), CONFIGS)
        fits = {c.config: c.fits for c in found}
        assert 216e9 < needed / 0.9 < 217e9 and fits["zero3_offload.json"] == expected
    row = make_plan(request("sra-8b", 8, memory="24GB"), CONFIGS)["candidates"][0]
    assert row["config"] == "zero0.json"
    assert row["host_bytes_per_node"] == 8 * 4 * 8_127_156_248
    assert request(gpus=8).host_memory == 2048e9 and request(gpus=1).host_memory == 256e9


def test_recomputation_is_chosen_where_it_saves_traffic():
    """Fewer, larger micro-batches fetch offloaded parameters less often."""
    offloaded = {"zero3_offload.json": CONFIGS["zero3_offload.json"]}
    best = recommended(candidates(request("sra-8b", 1, memory="24GB"), offloaded))
    assert best.case.recipe.training.activation_checkpointing and best.case.windows > 2
    free = recommended(candidates(request("sra-1b"), CONFIGS))
    assert not free.case.recipe.training.activation_checkpointing


def test_a_micro_batch_of_the_command_line_is_binding():
    """The recipe's own 64 is replaced: eight GPUs have 16 windows each."""
    asked = request(overrides=["training.micro_batch_size=4"])
    assert {c.case.windows for c in candidates(asked, CONFIGS) if not c.refused} == {4}
    assert {c.case.windows for c in candidates(request(), CONFIGS) if c.fits} == {16}
    with pytest.raises(ConfigError, match=r"micro_batch_size=64 .* 16 .*1, 2, 4, 8, 16"):
        candidates(request(overrides=["training.micro_batch_size=64"]), CONFIGS)


def test_the_command_can_be_pasted():
    overrides = ["data.train=[my folder]", "training.micro_batch_size=8"]
    asked = request(gpus=16, nodes=2, overrides=overrides[1:])
    asked = asked._replace(recipe_name="my recipe.yaml", overrides=tuple(overrides))
    best = make_plan(asked, CONFIGS)["recommendation"]
    for line in (best["command"], best["slurm"]):
        words = shlex.split(line)
        assert overrides[0] in words and any("my recipe.yaml" in word for word in words)


def test_the_recommended_command_is_accepted(tmp_path):
    """The dry run of the command finds nothing to object to."""
    found = make_plan(request("sra-128e", 1, memory="24GB"), CONFIGS)["recommendation"]
    words = found["command"].split()
    start = words.index("launch/train.py")
    assert words[:start] == ["deepspeed", "--num_gpus", "1"]
    result = call(sys.executable, *words[start:], "--dry-run", "--run", tmp_path / "run", cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_days_and_cost_follow_from_the_budget():
    plan = make_plan(request(tokens=1e9, price=2.0), CONFIGS)
    best = plan["recommendation"]
    fast, slow = best["seconds_per_step"]["optimistic"], best["seconds_per_step"]["conservative"]
    steps = 1e9 / plan["tokens_per_step"]
    assert best["days"] == pytest.approx([steps * fast / 86_400, steps * slow / 86_400])
    assert best["cost"] == pytest.approx([day * 24 * 8 * 2.0 for day in best["days"]])


def test_rows_are_marked_below_the_threshold_that_is_shown():
    """64 rows with one window of 128: too few in bf16, enough in float32."""
    asked = request("sra-1b", 8, memory="8GB", overrides=["data.sequence_length=128"])
    plan = make_plan(asked, CONFIGS)
    shown = plan["compute_bound_rows_per_expert"]
    marks = {
        (row["waits_for_weights"], row["tokens_per_expert"] < shown[row["precision"]])
        for row in plan["candidates"]
        if "refused" not in row
    }
    assert marks <= {(True, True), (False, False)}
    assert {row["precision"] for row in plan["candidates"][:1]} == {"fp32"}


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
    gathered = 1.5 * (
        found.all_reduce_copied - found.all_reduce_spread
    )  # 3 X for 2 X on both sides
    assert gathered == pytest.approx(1.5 * found.equal_at_tokens_per_gpu * per_token)


def test_a_ring_over_nodes_shares_their_ports():
    """64 processes, 8 a node: 800 MB all-reduced pass 2 x 63/64 of them through 8 ports of 50 GB/s, never
    faster than the links inside; alone in its node each has one port."""
    network = make_network(64, 8, H100, None, None)
    everyone = Transfer("gradients", "all_reduce", 8e8, 64, 0)
    spread = Transfer("gradients", "all_reduce", 8e8, 8, 0)
    assert transfer_seconds(everyone, network, 64) == pytest.approx(everyone.wire_bytes / 400e9)
    assert transfer_seconds(spread, network, 64) == pytest.approx(spread.wire_bytes / 50e9)
    assert transfer_seconds(spread._replace(neighbours=True), network, 64) == pytest.approx(
        spread.wire_bytes / 450e9
    )
    called = everyone._replace(calls=3)
    hops = transfer_seconds(called, network, 64) - transfer_seconds(everyone, network, 64)
    assert hops == pytest.approx(3 * math.log2(64) * 10e-6)


def test_an_all_to_all_is_limited_by_what_leaves_the_node():
    network = make_network(16, 2, H100, None, None)
    rows = Transfer("expert rows", "all_to_all", 16e9, 16, 0, neighbours=True)
    assert transfer_seconds(rows, network, 16) == pytest.approx(8e9 / 50e9)


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
    names = [choose_gpu(None, gb * GB)[0].name for gb in (16, 24, 48, 80, 141, 192)]
    assert names == ["RTX 4090", "RTX 4090", "A100 40GB", "H100", "H200", "H200"]


def test_memory_is_that_of_the_named_gpu_unless_given():
    assert choose_gpu("H100", None) == (H100, 80e9)
    assert choose_gpu("H100", 40e9) == (H100, 40e9)
    assert choose_gpu(None, None) == (GPUS["RTX 4090"], 24e9)


@pytest.mark.parametrize("name", ["tokens", "price", "intra_node", "inter_node", "efficiency"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_are_finite(name, value):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} {value}"):
        request(**{name: value})


def test_units_follow_the_size():
    sizes = (5, 4096, 1.72e6, 21e9, 1e12)
    assert [count(n) for n in sizes] == ["5", "4.10 k", "1.72 M", "21.0 G", "1.00 T"]
    spans = [span(0.002, 0.0031), span(1, 3), span(60, 150), span(3600, 9000), span(0, 3e6)]
    assert spans == [
        "2.00-3.10 ms",
        "1.00-3.00 s",
        "1.00-2.50 min",
        "1.00-2.50 h",
        "0.00-34.7 days",
    ]


def test_the_text_starts_with_the_recommendation_and_fits_a_terminal():
    for asked in (
        request("quickstart", 1),
        request("sra-8b", 64, 8, price=2.5),
        request("sra-8b", memory="24GB"),
        request(memory="1GB"),
    ):
        plan = make_plan(asked, CONFIGS)
        lines = render(plan).splitlines()
        commands = ("deepspeed ", "DEEPSPEED=")
        assert max(len(line) for line in lines if not line.startswith(commands)) <= 100
        first = next(n for n, line in enumerate(lines) if line.startswith(HEAD[0]))
        said = "recommended: " if plan["recommendation"] else "nothing fits"
        assert any(line.startswith(said) for line in lines[:first])
        assert ("between nodes" in lines[1]) == (asked.machine.network.nodes > 1)
        assert not any("0.000 GB" in line or "0.00 G tokens" in line for line in lines)
        ignored = any("top_k_schedule" in line for line in lines)
        assert ignored == bool(asked.recipe.training.top_k_schedule)


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
    for part in (
        "zero3_offload",
        "rows:",
        "host:",
        "bf16",
        "fp32",
        "all-to-all",
        "equal at",
        "launch/train.py",
    ):
        assert part in result.stdout
    whole = plan("--recipe", "sra-128e", "--gpus", 8, "--json")
    assert len(json.loads(whole.stdout)["candidates"]) == len(ONE_NODE) * 4


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
        (["--gpus", 10**9], ["--gpus 1000000000", "100,000"]),
        (["--tokens", "inf"], ["--tokens inf", "finite"]),
        (["--host-memory", "many"], ["--host-memory many", "24GB"]),
        (["--study", "unused", "--gpus", 8], ["--study", "leave out"]),
    ],
)  # fmt: skip
def test_wrong_input_is_named_in_one_line(arguments, named):
    result = plan("--recipe", "sra-128e", *arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert all(part in last for part in named), last
