"""The compiled experts against torch's grouped products, which define them."""

import pytest
import torch
from torch import Tensor

from sra_ds.ops.extension import extension
from sra_ds.ops.feed_forward import Weights, feed_forward, feed_forward_reference, runs_compiled

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif("cpu" not in extension().devices, reason=extension().reason),
]

KINDS = ("gelu", "gelu with biases", "swiglu")
COUNTS = {
    "uneven": [0, 7, 1, 33, 0, 12, 130, 3],
    "one takes all": [0, 0, 0, 77, 0, 0, 0, 0],
    "even": [8] * 8,
    "none": [0] * 8,
}
WIDTH, HIDDEN = 24, 40


def weights_of(kind: str, experts: int = 8) -> Weights:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape) / shape[-2] ** 0.5

    biases = [
        torch.randn(experts, n) if kind == "gelu with biases" else None for n in (HIDDEN, WIDTH)
    ]
    gate = random(experts, WIDTH, HIDDEN) if kind == "swiglu" else None
    return Weights(
        gate, random(experts, WIDTH, HIDDEN), biases[0], random(experts, HIDDEN, WIDTH), biases[1]
    )


def run(function, x_RD, weights, offsets_E, upstream_RD, dtype):
    """Value and gradients, of x and of every weight there is."""
    given = [x_RD, *weights]
    own = [t if t is None else t.detach().to(dtype).requires_grad_() for t in given]
    y_RD = function(own[0], Weights(*own[1:]), offsets_E)
    y_RD.backward(upstream_RD.to(dtype))
    return [y_RD.detach(), *(t.grad for t in own if t is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_every_gradient_equal_the_definition(kind, counts, dtype):
    """In float32 against float64; in bf16 no further from it than torch's own bf16 products."""
    weights = Weights(*(t if t is None else t.to(dtype).float() for t in weights_of(kind)))
    offsets_E = torch.tensor(COUNTS[counts]).cumsum(0, dtype=torch.int32)
    x_RD, upstream_RD = (torch.randn(int(offsets_E[-1]), WIDTH).to(dtype).float() for _ in range(2))
    assert runs_compiled(
        x_RD.to(dtype), Weights(*(t if t is None else t.to(dtype) for t in weights)), 0
    )
    inputs = (x_RD, weights, offsets_E, upstream_RD)
    found, exact = (
        run(feed_forward, *inputs, dtype),
        run(feed_forward_reference, *inputs, torch.float64),
    )
    torchs = run(feed_forward_reference, *inputs, dtype) if dtype == torch.bfloat16 else exact
    for mine, theirs, expected in zip(found, torchs, exact, strict=True):
        allowed = 1e-5 if dtype == torch.float32 else 1.3 * distance(theirs, expected) + 1e-3
        assert distance(mine, expected) <= allowed


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / (expected.norm() + 1e-12))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind):
    weights, offsets_E = (
        weights_of(kind),
        torch.tensor(COUNTS["uneven"]).cumsum(0, dtype=torch.int32),
    )
    x_RD, upstream_RD = torch.randn(186, WIDTH), torch.randn(186, WIDTH)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(feed_forward, x_RD, weights, offsets_E, upstream_RD, torch.float32))
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_keeps_torchs_contract(kind):
    weights = Weights(*(t if t is None else t.requires_grad_() for t in weights_of(kind)))
    offsets_E = torch.tensor(COUNTS["uneven"]).cumsum(0, dtype=torch.int32)
    x_RD = torch.randn(186, WIDTH, requires_grad=True)
    feed_forward(x_RD, weights, offsets_E)  # registers
    operator = torch.ops.sra_kernels.feed_forward.default
    torch.library.opcheck(operator, (x_RD, *weights, offsets_E))


def test_it_compiles_without_graph_breaks():
    weights, offsets_E = (
        weights_of("swiglu"),
        torch.tensor(COUNTS["uneven"]).cumsum(0, dtype=torch.int32),
    )
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    inputs = (torch.randn(186, WIDTH), weights, offsets_E, torch.randn(186, WIDTH), torch.float32)
    for mine, theirs in zip(run(compiled, *inputs), run(feed_forward, *inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_it_cannot_take_goes_to_torch():
    weights = weights_of("gelu")
    x_RD = torch.randn(3, WIDTH)
    assert not runs_compiled(x_RD.double(), weights, 0)
    assert not runs_compiled(x_RD, weights, 0.1)
    assert not runs_compiled(x_RD.bfloat16(), weights, 0)
    few = Weights(*(t if t is None else t[:1] for t in weights))
    assert not runs_compiled(x_RD, few, 0)


def test_wrong_offsets_are_refused_in_words():
    weights = weights_of("gelu")
    with pytest.raises(RuntimeError, match="end at the number of rows"):
        feed_forward(torch.randn(5, WIDTH), weights, torch.zeros(8, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="int32 offsets"):
        feed_forward(torch.randn(0, WIDTH), weights, torch.zeros(8, dtype=torch.int64))
