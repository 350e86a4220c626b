"""Memory on a GPU, where no test can measure it: arithmetic, and what differs from the measured CPU."""

import pytest

from sra_ds.config import load_recipe
from sra_ds.planning.activations import activation_bytes
from sra_ds.planning.case import Case
from sra_ds.planning.memory import estimate, gathered_elements
from sra_ds.planning.shapes import Layout, read_shapes
from sra_ds.planning.zero import Zero

SMALL_BUCKET = 1000


def case(name="sra-128e", world=8, device="cuda", overrides=(), width=2, times=1, **zero) -> Case:
    recipe = load_recipe(name, list(overrides))
    return Case(recipe, read_shapes(recipe), Layout(world), Zero(**zero), 1, times, width, device)


def parameters(one: Case) -> int:
    return sum(weight.numel for weight in one.shapes.weights)


def test_zero_1_of_sra_8b_on_64_gpus():
    """2 bytes of every parameter everywhere, 12 of every 64th."""
    memory = estimate(case("sra-8b", 64, stage=1))
    assert memory.parameters == pytest.approx(16.25e9, rel=1e-3)
    assert memory.optimizer == pytest.approx(1.52e9, rel=3e-3)


def test_dropout_masks_are_one_byte_on_a_gpu():
    """sra-128e with fused attention: 256 tokens x (4 layers x 2 experts x 1,024 + 512 of the embedding)
    masks, as bytes instead of numbers of 2."""
    fused = ["model.mixer.dropout=0"]
    on_gpu, on_cpu = (
        activation_bytes(case(device=device, overrides=fused)) for device in ("cuda", "cpu")
    )
    assert on_cpu.kept - on_gpu.kept == 256 * (4 * 2 * 1024 + 512)


def test_attention_with_dropout_stays_fused_on_a_gpu():
    """On the CPU it keeps three 256 x 256 matrices of each of 8 heads."""
    plain = ["model.mixer.dropout=0"]
    with_dropout, without = (
        activation_bytes(case(overrides=overrides)) for overrides in ((), plain)
    )
    assert with_dropout.kept == without.kept
    on_cpu = activation_bytes(case(device="cpu")).kept
    assert on_cpu - with_dropout.kept > 4 * (3 * 8 * 256 * 256 - 3 * 256 * 512) * 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bucket_is_reserved_whole_on_a_gpu(stage):
    """The CPU has pages only for what is written. One process reduces nothing."""
    zero = {"stage": stage, "reduce_bucket": 10**9}
    on_gpu, on_cpu = (estimate(case(world=1, device=d, **zero)) for d in ("cuda", "cpu"))
    whole = 2 * parameters(case())
    assert on_gpu.buffers - on_cpu.buffers >= 2 * 10**9 - whole * (1 + (stage == 3))
    if stage < 3:
        assert (on_gpu.buffers, on_cpu.buffers) == (2 * 10**9, whole)


def test_stage_2_reduces_with_its_bucket_the_copy_and_its_own_gradients():
    one = case(stage=2, reduce_bucket=SMALL_BUCKET)
    memory = estimate(one)
    buffers = SMALL_BUCKET * 2 + 2 * SMALL_BUCKET * 2  # a parameter larger than two buckets
    needed = memory.gradients + activation_bytes(one).layer + buffers
    assert memory.moments["backward"] == memory.parameters + memory.optimizer + needed


def test_stage_3_reduces_one_copy_on_a_gpu_and_gloo_one_more():
    one = case(stage=3, reduce_bucket=SMALL_BUCKET)
    largest = max(weight.numel for weight in one.shapes.weights)
    assert estimate(one).buffers == 2 * (SMALL_BUCKET + largest)
    on_cpu = case(stage=3, reduce_bucket=SMALL_BUCKET, device="cpu")
    assert estimate(on_cpu).buffers == 2 * (SMALL_BUCKET + 2 * largest)


def test_the_model_is_built_in_float32_on_the_host():
    assert estimate(case(stage=1)).host == 4 * parameters(case())
    assert estimate(case(stage=1, device="cpu")).host == 0


def test_one_process_holds_what_it_fetches_from_the_host_but_gathers_nothing():
    """All of sra-128e: its parameters are used again within the default reuse distance."""
    fetched = {"stage": 3, "parameters_on_host": True}
    assert gathered_elements(case(world=1, stage=3)).whole == 0
    assert gathered_elements(case(world=1, **fetched)) == (parameters(case()), 0)
    assert gathered_elements(case(world=1, device="cpu", **fetched)).whole == 0
