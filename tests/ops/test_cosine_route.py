"""The compiled routing operator against the torch functions that define it.

SRA_TEST_DEVICE=cuda runs all of it on a GPU; tests/kernels/test_emulated_gpu.py on an emulated one.
"""

import itertools
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sra_ds.ops.cosine_route import (
    FUSED_DEVICES,
    GATES,
    can_be_fused,
    cosine_route,
    cosine_route_reference,
    runs_compiled,
)
from sra_ds.ops.extension import extension
from sra_ds.ops.top_k_routing import Selection

DEVICE = os.environ.get("SRA_TEST_DEVICE", "cpu")
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory", "on_device"),
    pytest.mark.skipif(DEVICE not in extension().devices, reason=extension().reason),
]

SIZES = [
    (1, 3, 1, 1), (7, 5, 3, 3), (63, 72, 17, 2), (257, 33, 128, 1), (300, 64, 100, 16),
    (90, 16, 1000, 32),
    (513, 40, 1000, 8), (70, 512, 4096, 4),
]  # fmt: skip
SHORT_SIZES = [
    (130, 48, 64, 2), (1, 8, 1, 1), (129, 72, 33, 3), (200, 136, 200, 4), (64, 512, 256, 16),
    (257, 65, 100, 2), (40, 24, 300, 5),
]  # fmt: skip
FACTS = ("gates_TK", "mean_probs_E", "lse_T")


@pytest.fixture
def on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def inputs(
    tokens: int, width: int, experts: int, temperatures: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and anchors of any length, temperatures of both signs."""
    x_TD = torch.randn(tokens, width) * torch.rand(tokens, 1) * 5
    anchors_ED = torch.randn(experts, width) * torch.rand(experts, 1) * 3
    signs = 1 - 2 * (torch.arange(temperatures) % 2)
    return x_TD.to(dtype), anchors_ED.to(dtype), 8 * signs * (0.5 + torch.rand(temperatures))


def selection(tokens: int, experts: int, wanted: bool) -> Selection:
    if not wanted:
        return Selection()
    valid_T = torch.rand(tokens) < 0.7
    return Selection(valid_T, torch.randn(experts), torch.randn(tokens, experts))


def leaves(tensors: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """By the size of what is expected; sums over all tokens may cancel to little."""
    size = float(expected.double().norm())
    assert float((found.double() - expected.double()).norm()) <= tolerance * size + 1e-6


def compare(tensors, top_k, gate, chosen_by, tolerance) -> None:
    """Values and every gradient against the definition in float64."""
    assert runs_compiled(tensors[0], tensors[1], top_k)
    mine, exact = leaves(tensors), leaves(tensors, torch.float64)
    wide = Selection(chosen_by.valid_T, *(t if t is None else t.double() for t in chosen_by[1:]))
    found, _ = cosine_route(*mine, top_k, gate, chosen_by)
    _, scores_TE = cosine_route(*mine, top_k, gate, chosen_by, keep_scores=True)
    expected, expected_TE = cosine_route_reference(*exact, top_k, gate, wide, keep_scores=True)
    assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(found.load_E.double(), expected.load_E)
    assert found.valid_count == expected.valid_count
    torch.testing.assert_close(found.gates_TK.double(), expected.gates_TK, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        found.mean_probs_E.double(), expected.mean_probs_E, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(found.lse_T.double(), expected.lse_T, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(scores_TE.double(), expected_TE, rtol=0, atol=2e-5)
    weights = [torch.randn_like(getattr(expected, fact)) for fact in FACTS]
    for routing in (found, expected):
        parts = (getattr(routing, f).double() * w for f, w in zip(FACTS, weights, strict=True))
        sum(part.sum() for part in parts).backward()
    for own, other in zip(mine, exact, strict=True):
        assert_near(own.grad, other.grad, tolerance)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("selective", [False, True], ids=["plain", "selective"])
def test_values_and_every_gradient_equal_the_definition(size, gate, selective):
    tokens, width, experts, top_k = size
    tensors = inputs(tokens, width, experts)
    compare(tensors, top_k, gate, selection(tokens, experts, selective), 1e-5)


@pytest.mark.parametrize("size", SHORT_SIZES, ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_numbers_are_read_exactly(size, gate, dtype):
    """Values are those of the rounded inputs; gradients are rounded at the end, and those of bf16 before
    their products too."""
    tokens, width, experts, top_k = size
    tensors = inputs(tokens, width, experts, experts, dtype)
    chosen_by = selection(tokens, experts, tokens % 2 == 0)
    compare(tensors, top_k, gate, chosen_by, 6e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.skipif(DEVICE not in FUSED_DEVICES, reason="the fused kernels are for GPUs")
def test_fused_kernels_find_what_the_others_find():
    tensors = inputs(333, 200, 96, dtype=torch.bfloat16)
    assert can_be_fused(*tensors[:2])
    fused, _ = cosine_route(*tensors, 2, "all")
    other, scores_TE = cosine_route(*tensors, 2, "all", keep_scores=True)
    assert scores_TE.shape == (333, 96)
    assert torch.equal(fused.expert_ids_TK, other.expert_ids_TK)
    torch.testing.assert_close(fused.gates_TK, other.gates_TK, rtol=0, atol=1e-6)


def test_tokens_at_any_address():
    """A view into other numbers, as of a buffer that is shared."""
    x_TD, anchors_ED, temperature = inputs(70, 64, 32, dtype=torch.bfloat16)
    moved_TD = torch.cat([x_TD.new_zeros(3), x_TD.flatten()])[3:].view_as(x_TD)
    first, second = (
        cosine_route(x, anchors_ED, temperature, 2, "all")[0] for x in (x_TD, moved_TD)
    )
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_tokens_and_anchors_may_have_different_types():
    x_TD, _, temperature = inputs(40, 16, 8, dtype=torch.bfloat16)
    compare((x_TD, torch.randn(8, 16), temperature), 2, "all", Selection(), 4e-3)


@pytest.mark.parametrize("temperatures", [1, 24])
def test_temperatures_learn_alone_or_together(temperatures):
    compare(inputs(90, 20, 24, temperatures), 3, "selected", Selection(), 1e-5)


def route_of(scores_TE: Tensor, top_k: int, **selected: Tensor):
    """The operator on tokens whose cosines with the anchors are `scores_TE`."""
    experts = scores_TE.shape[1]
    return cosine_route(
        scores_TE, torch.eye(experts), torch.ones(1), top_k, "all", Selection(**selected)
    )[0]


def test_ties_go_to_the_lower_id():
    even_TE = torch.ones(5, 40)
    assert route_of(even_TE, 4).expert_ids_TK.tolist() == [[0, 1, 2, 3]] * 5
    some_TE = torch.zeros(1, 40)
    some_TE[0, [7, 19, 33]] = 1
    assert route_of(some_TE, 4).expert_ids_TK.tolist() == [[7, 19, 33, 0]]


def test_what_is_not_a_number_never_wins():
    bias_E = torch.zeros(20)
    bias_E[:17] = float("nan")
    bias_E[17] = -float("inf")
    found = route_of(torch.ones(3, 20), 4, bias_E=bias_E)
    assert found.expert_ids_TK.tolist() == [[18, 19, 0, 1]] * 3
    broken_TE = torch.full((2, 20), float("nan"))
    broken_TE[1] = 1
    found = route_of(broken_TE, 2)
    assert found.expert_ids_TK.tolist() == [[0, 1]] * 2
    assert found.gates_TK[0].isnan().all() and found.gates_TK[1].isfinite().all()


def test_vectors_without_direction_have_no_gradient_along_themselves():
    x_TD, anchors_ED, temperature = inputs(6, 10, 5)
    x_TD[2] = 0
    x_TD[4] *= 1e-12
    anchors_ED[3] = 0
    mine, theirs = (leaves((x_TD, anchors_ED, temperature)) for _ in range(2))
    for route, own in ((cosine_route, mine), (cosine_route_reference, theirs)):
        routing, _ = route(*own, 2, "all")
        (routing.gates_TK.square().sum() + routing.lse_T.sum()).backward()
    for own, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(
            own.grad, other.grad, rtol=1e-4, atol=1e-5 * float(other.grad.abs().max())
        )


def test_no_tokens_and_no_valid_tokens():
    nothing, _ = cosine_route(torch.zeros(0, 8), torch.randn(4, 8), torch.ones(1), 2, "all")
    assert nothing.gates_TK.shape == (0, 2) and nothing.load_E.tolist() == [0] * 4
    unseen = route_of(torch.randn(9, 4), 2, valid_T=torch.zeros(9, dtype=torch.bool))
    assert unseen.valid_count == 0 and not unseen.mean_probs_E.any() and not unseen.lse_T.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_threads(dtype):
    tensors = inputs(3000, 32, 64, dtype=dtype)
    weights_TK, weights_E = torch.randn(3000, 2), torch.randn(64)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        own = leaves(tensors)
        routing, _ = cosine_route(*own, 2, "all")
        (
            (routing.gates_TK * weights_TK).sum() + (routing.mean_probs_E * weights_E).sum()
        ).backward()
        torch.set_num_threads(before)
        results.append([*routing, *(tensor.grad for tensor in own)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


WAYS = [torch.float32, pytest.param(torch.bfloat16, id="bfloat16, fused on a GPU")]


@pytest.mark.parametrize("gate", range(3))
@pytest.mark.parametrize("dtype", WAYS)
def test_the_operator_keeps_torchs_contract(gate, dtype):
    x_TD, anchors_ED, temperature = leaves(inputs(37, 16, 24, dtype=dtype))
    operator = torch.ops.sra_kernels.cosine_route.default
    cosine_route(x_TD, anchors_ED, temperature, 2, "all")  # registers
    fused = can_be_fused(x_TD, anchors_ED)
    assert fused == (dtype == torch.bfloat16 and DEVICE in FUSED_DEVICES)
    for selected in (selection(37, 24, True), Selection()):
        torch.library.opcheck(operator, (x_TD, anchors_ED, temperature, 2, gate, fused, *selected))


@pytest.mark.parametrize("dtype", WAYS)
def test_it_compiles_without_graph_breaks(dtype):
    def loss(x_TD: Tensor, anchors_ED: Tensor, temperature: Tensor) -> Tensor:
        routing, _ = cosine_route(x_TD, anchors_ED, temperature, 2, "all")
        return routing.gates_TK.square().sum() + (routing.mean_probs_E * routing.load_E).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for tokens in (33, 65, 1000):
        mine, theirs = (leaves(t) for t in itertools.repeat(inputs(tokens, 16, 24, dtype=dtype), 2))
        first, second = compiled(*mine), loss(*theirs)
        torch.testing.assert_close(first, second)
        first.backward(), second.backward()
        for own, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_it_follows_the_current_stream_and_can_be_captured():
    tensors = inputs(300, 64, 32, dtype=torch.bfloat16)
    expected, _ = cosine_route(*tensors, 2, "all")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside, _ = cosine_route(*tensors, 2, "all")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = cosine_route(*tensors, 2, "all")
    graph.replay()
    torch.cuda.synchronize()
    for found in (beside, captured):
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_autocast_is_kept_out():
    tensors = inputs(30, 16, 8)
    results = []
    for enabled in (False, True):
        own = leaves(tensors)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            routing, _ = cosine_route(*own, 2, "all")
            routing.lse_T.sum().backward()
        results.append([routing.lse_T, routing.gates_TK, *(tensor.grad for tensor in own)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_layouts_and_types_that_mean_the_same_give_the_same():
    x_TD, anchors_ED, temperature = inputs(40, 16, 8)
    chosen_by = selection(40, 8, True)
    plain, _ = cosine_route(x_TD, anchors_ED, temperature, 2, "all", chosen_by)
    other, _ = cosine_route(
        torch.cat([x_TD, x_TD], -1)[:, :16],
        anchors_ED.T.contiguous().T,
        temperature.double().expand(8),
        2,
        "all",
        Selection(
            chosen_by.valid_T.repeat_interleave(2)[::2],
            chosen_by.bias_E.double(),
            chosen_by.noise_TE.T.contiguous().T,
        ),
    )
    assert all(torch.equal(*pair) for pair in zip(plain, other, strict=True))


def test_only_some_facts_may_have_gradients():
    """Of a loss of one fact alone, with nothing from upstream for the others."""
    tensors = inputs(30, 16, 8)
    for fact in FACTS:
        mine, theirs = leaves(tensors), leaves(tensors)
        for route, own in ((cosine_route, mine), (cosine_route_reference, theirs)):
            getattr(route(*own, 2, "all")[0], fact).square().sum().backward()
        for own, other in zip(mine, theirs, strict=True):
            assert_near(own.grad, other.grad, 1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"anchors": (5, 6)}, "anchors E x D expected, got 3 x 4 and 5 x 6"),
        ({"temperature": (3,)}, "temperature of 1 or E entries expected, got 3 for 5 experts"),
        ({"top_k": 6}, "k between 1 and 5 expected, got 6"),
        ({"valid_T": torch.ones(4, dtype=torch.bool)}, "valid must be bool, one for each of 3 tokens"),
        ({"valid_T": torch.ones(3)}, "valid must be bool, one for each of 3 tokens"),
        ({"bias_E": torch.zeros(1)}, "bias must be float32, one for each of 5 experts"),
        ({"noise_TE": torch.zeros(5, 3)}, "noise must be float32, 3 x 5"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(changes, said):
    anchors_ED = torch.randn(changes.pop("anchors", (5, 4)))
    temperature = torch.ones(changes.pop("temperature", (1,)))
    top_k = changes.pop("top_k", 2)
    chosen_by = Selection(**{name: tensor.to(DEVICE) for name, tensor in changes.items()})
    with pytest.raises(RuntimeError, match=said):
        cosine_route(torch.randn(3, 4), anchors_ED, temperature, top_k, "all", chosen_by)


def gradients_of(ids_TK: Tensor, experts: int) -> tuple[Tensor, ...]:
    """The backward operator, called with these ids by hand."""
    tokens, top_k = ids_TK.shape
    x_TD, anchors_ED, temperature = inputs(tokens, 4, experts)
    upstream = torch.ones(tokens, top_k), torch.ones(experts), torch.ones(tokens)
    lse_T, valid_count, dots_TE = torch.ones(tokens), torch.ones(1), torch.ones(tokens, experts)
    return torch.ops.sra_kernels.cosine_route_backward(
        *upstream, x_TD, anchors_ED, temperature, 1, False, None,
        ids_TK, lse_T, valid_count, dots_TE, torch.ones(tokens), torch.ones(experts),
    )  # fmt: skip


@pytest.mark.parametrize(("experts", "top_k"), [(5, 0), (5, 6), (100, 33), (4096, 100)])
def test_more_experts_than_can_be_chosen_are_refused_backwards_too(experts, top_k):
    most = min(experts, 32)
    with pytest.raises(RuntimeError, match=f"k between 1 and {most} expected, got {top_k}"):
        gradients_of(torch.zeros(3, top_k, dtype=torch.int64), experts)


@pytest.mark.skipif(DEVICE in FUSED_DEVICES, reason="a GPU believes the ids it is given")
@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_experts_that_are_none_are_refused_backwards(wrong):
    ids_TK = torch.tensor([[0, 4], [1, 2], [3, 0]])
    assert all(gradient.isfinite().all() for gradient in gradients_of(ids_TK, 5))
    ids_TK[2, 1] = wrong
    with pytest.raises(RuntimeError, match="ids from 0 to 4 expected"):
        gradients_of(ids_TK, 5)
