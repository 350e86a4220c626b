"""Step times from arithmetic of their own: what sra-8b needs on data-sheet hardware, by hand."""

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from sra_ds.config import load_recipe
from sra_ds.data.loader import random_batch
from sra_ds.model.counting import count_parameters
from sra_ds.model.language_model import build_model
from sra_ds.ops.extension import use_kernels
from sra_ds.planning.case import Case
from sra_ds.planning.communication import Transfer, step_transfers
from sra_ds.planning.hardware import GPUS, make_network
from sra_ds.planning.memory import estimate
from sra_ds.planning.offload import host_traffic
from sra_ds.planning.shapes import Layout, read_shapes
from sra_ds.planning.step_time import (
    DENSE_KERNELS,
    EXPERT_KERNELS,
    Machine,
    Spread,
    StepTime,
    step_kernels,
    step_time,
    step_work,
    transfer_seconds,
    worst_spread,
)
from sra_ds.planning.zero import Zero
from sra_ds.training.step import step_loss

PARAMETERS, ACTIVE = 8_127_156_248, 950.2e6
WINDOW, WIDTH, LAYERS = 2048, 2048, 24
H100 = GPUS["H100"]


def case(world=64, windows=4, times=4, ep=1, width=2, overrides=(), **zero) -> Case:
    recipe = load_recipe("sra-8b", list(overrides))
    layout = Layout(world, ep, marked=ep > 1)
    return Case(recipe, read_shapes(recipe), layout, Zero(**zero), windows, times, width)


def timed(one: Case, nodes: int = 8) -> StepTime:
    machine = Machine(H100, make_network(one.layout.world, nodes, H100, None, None), 0.35)
    counts = count_parameters(build_model(one.recipe, "meta"))
    return step_time(one, step_work(one, counts), step_transfers(one), machine)


def test_sra_8b_has_the_parameters_of_this_file():
    counts = count_parameters(build_model(load_recipe("sra-8b"), "meta"))
    assert counts["total"] == PARAMETERS
    assert counts["active_with_anchors"] == pytest.approx(ACTIVE, rel=1e-4)


def test_computation_is_six_operations_per_active_parameter_and_the_attention():
    """On 64 H100 at 35 %: 32,768 tokens each take 597 ms."""
    operations = 6 * (ACTIVE + LAYERS * WINDOW * WIDTH) * 4 * 4 * WINDOW
    assert timed(case()).compute == pytest.approx(operations / (989e12 * 0.35), rel=1e-4)
    assert timed(case()).compute == pytest.approx(0.597, abs=0.001)


def test_recomputation_repeats_a_third_of_all_but_the_head():
    head = 32_000 * WIDTH
    operations = 6 * LAYERS * WINDOW * WIDTH + 6 * (ACTIVE - head)
    again = case(overrides=["training.activation_checkpointing=true"])
    more = timed(again).compute - timed(case()).compute
    assert more == pytest.approx(operations / 3 * 16 * WINDOW / (989e12 * 0.35), rel=1e-3)


def test_a_small_micro_batch_waits_for_the_weights_of_its_experts():
    """One window of 1,024 gives 64 rows to each of 64 experts, whose weights are read three times; at
    35 % of the peak the products of 103 would take as long."""
    one = case(windows=1, times=32, overrides=["data.sequence_length=1024"])
    experts = sum(weight.numel for weight in one.shapes.weights if weight.expert)
    reads = 3 * 32 * experts * 2 / 3350e9
    dense = (ACTIVE - experts * 4 / 64 + LAYERS * 1024 * WIDTH) * 6 * 32 * 1024
    assert experts > 0.9 * PARAMETERS
    assert timed(one).compute == pytest.approx(dense / (989e12 * 0.35) + reads, rel=1e-3)


@pytest.mark.parametrize(("ep", "rows"), [(1, 128 * 4), (8, 128 * 4 * 8)])
def test_an_expert_sees_the_tokens_of_all_processes_that_share_it(ep, rows):
    """4 windows of 2,048 tokens choose 4 of 64 experts each."""
    assert case(ep=ep).rows_per_expert == rows
    assert timed(case(ep=ep)).waits_for_weights == (rows < 295)


def test_rows_are_held_against_the_threshold_of_their_precision():
    assert timed(case(windows=1, times=16)).waits_for_weights
    assert not timed(case(windows=1, times=16, width=4)).waits_for_weights


def test_the_update_reads_and_writes_states_once():
    """Gradient and twice three states of 4 bytes, and the parameter of 2: 30 bytes each."""
    assert timed(case(stage=1)).update == pytest.approx(PARAMETERS / 64 * 30 / 3350e9, rel=1e-3)
    assert timed(case(stage=0, width=4)).update == pytest.approx(PARAMETERS * 28 / 3350e9)
    on_host = timed(case(stage=2, optimizer_on_host=True))
    assert on_host.update == pytest.approx(PARAMETERS / 64 * 28 / (200e9 / 8), rel=1e-3)


OFFLOADED = {"stage": 3, "optimizer_on_host": True, "parameters_on_host": True}


def test_offloaded_parameters_are_fetched_forwards_and_backwards_for_every_micro_batch():
    """2 x 16.25 GB x 512 / 25 GB/s = 666 s, less what stays from the end of the forward pass: half a
    billion elements and at most the experts of a layer, 0.32 billion more."""
    one = case(1, 2, 512, **OFFLOADED)
    whole = 2 * 2 * PARAMETERS * 512
    found = host_traffic(one).parameters
    assert whole * (1 - 0.82 / 16) < found < whole * (1 - 0.5 / 16) * 1.01
    assert whole / 25e9 == pytest.approx(666, abs=1)
    assert timed(one, nodes=1).offload > 2 * 0.95 * 666  # gradients travel as far


def test_offloaded_gradients_of_stage_3_go_to_the_host_and_back_for_every_micro_batch():
    """2 bytes each way, and once more in float32 for the optimizer."""
    for times in (1, 4):
        expected = (2 * 2 * times + 4) * PARAMETERS / 8
        found = host_traffic(case(8, 1, times, **OFFLOADED))
        assert found.gradients == pytest.approx(expected, rel=1e-3) and found.updated == 0


def test_offloaded_gradients_of_stage_2_are_added_up_on_the_gpu():
    """One process: the first of four sums goes to the host, the others there and back, then 4 bytes of
    each for the optimizer; the updated 2 bytes come back. A single micro-batch sends only the last."""
    several, single = (
        host_traffic(case(1, 1, times, stage=2, optimizer_on_host=True)) for times in (4, 1)
    )
    assert several.gradients == pytest.approx((7 * 2 + 4) * PARAMETERS, rel=1e-6)
    assert single.gradients == pytest.approx(4 * PARAMETERS, rel=1e-6)
    assert several.updated == single.updated == pytest.approx(2 * PARAMETERS, rel=1e-6)
    assert sum(host_traffic(case(1, 1, 4, stage=2))) == 0


def test_the_host_holds_what_is_offloaded_and_the_model_it_was_built_as():
    """Master copy and two moments, gradients of 4 bytes, parameters of 2 to send; gradients of 2 while
    they are added up; the model in float32."""
    single = estimate(case(1, 1, 1, stage=2, optimizer_on_host=True)).host
    assert single == pytest.approx((12 + 4 + 2 + 4) * PARAMETERS, rel=0.02)
    several = estimate(case(1, 1, 4, stage=2, optimizer_on_host=True)).host
    assert several - single == pytest.approx(2 * PARAMETERS, rel=1e-6)
    both = estimate(case(1, 1, 1, **OFFLOADED)).host
    assert both == pytest.approx((12 + 4 + 2 + 2 + 4) * PARAMETERS, rel=1e-3)
    assert estimate(case(stage=1)).host == 4 * PARAMETERS


@pytest.mark.parametrize(
    ("world", "processes", "neighbours", "per_node", "expected"),
    [
        (12, 4, True, 6, Spread(2, 2)),  # ranks 4 to 7 of nodes 0-5 and 6-11
        (12, 2, True, 6, Spread(1, 2)),
        (12, 6, True, 6, Spread(1, 6)),
        (20, 4, True, 5, Spread(2, 1)),  # ranks 4 to 7: one on the first node, three on the next
        (12, 3, False, 6, Spread(2, 1)),  # every fourth: 0, 4 and 8
        (64, 8, False, 8, Spread(8, 1)),
        (64, 64, False, 8, Spread(8, 8)),
        (16, 16, True, 8, Spread(2, 8)),
    ],
)
def test_groups_are_where_their_ranks_are(world, processes, neighbours, per_node, expected):
    assert worst_spread(world, processes, neighbours, per_node) == expected


def test_a_group_that_straddles_nodes_is_as_slow_as_its_port():
    """Of four processes two are elsewhere: 2/3 of what each sends leaves by its port of 50 GB/s."""
    network = make_network(12, 2, H100, None, None)
    rows = Transfer("expert rows", "all_to_all", 4e9, 4, 0, neighbours=True)
    assert transfer_seconds(rows, network, 12) == pytest.approx(3e9 * 2 / 3 / 50e9)


FREE = {
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze",
    "detach", "split", "split_with_sizes", "permute", "as_strided", "alias", "unbind", "unfold",
    "empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "promote_types",
    "lift_fresh",
}  # fmt: skip


class KernelCounter(TorchDispatchMode):
    """Counts operators that compute or copy; views and allocations start no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function._schema.name.split("::")[1]] += 1
        return function(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        return sum(n for name, n in self.names.items() if name not in FREE)


def counted(name: str, layers: int) -> int:
    small = ["model.width=64", f"model.layers={layers}", "data.tokenizer.vocab_size=300"]
    small += ["data.sequence_length=64", "training.batch_size=2", "training.micro_batch_size=0"]
    recipe = load_recipe(name, [*small, "model.mixer.heads=4", "training.top_k_schedule=[]"])
    model, batch = build_model(recipe).train(), random_batch(recipe, 2, 0)
    with use_kernels("reference"), KernelCounter() as counter:
        step_loss(model(*batch), recipe.losses).total.backward()
    return counter.kernels


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("sra-128e", EXPERT_KERNELS), ("sra-1b", EXPERT_KERNELS), ("dense-small", DENSE_KERNELS)],
)
def test_a_layer_starts_about_the_assumed_kernels(name, kernels):
    one, two = counted(name, 2), counted(name, 3)
    assert two - one == pytest.approx(2 * kernels, rel=0.25)


def test_a_step_is_no_faster_than_its_kernels_are_started():
    """24 layers x 2 passes x 130 kernels at 5 us are 31 ms a micro-batch, however few its tokens; with
    recomputation three passes."""
    single = timed(case(1024, 1, 1, stage=1), nodes=128)
    assert 0.031 < single.launches < 0.050  # with 10 for each of its parameters
    assert single.optimistic >= single.launches + single.update
    per_micro = step_kernels(case(windows=1, times=2)) - step_kernels(case(windows=1, times=1))
    assert per_micro == 24 * 2 * 130 + 50
    again = case(windows=1, times=1, overrides=["training.activation_checkpointing=true"])
    assert step_kernels(again) - step_kernels(case(windows=1, times=1)) == 24 * 130


def test_the_bounds_are_the_sum_and_the_longest_and_the_update():
    time = StepTime(5.0, 1.0, 2.0, 3.0, 0.5, False)
    assert (time.conservative, time.optimistic) == (11.5, 5.5)
    assert time._replace(offload=9.0).optimistic == 9.5
