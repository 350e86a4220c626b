"""Attention with the entropy of its weights: every form against the definition, in value and gradient."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from references import leaves
from sra_ds.model.context import visible_positions
from sra_ds.ops import entropy_attention as module
from sra_ds.ops.entropy_attention import (
    entropy_attention,
    entropy_attention_reference,
    flex_entropy_attention,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

SEQUENCES, HEADS, CHANNELS = 3, 2, 8
SIZES = [(1, 1), (1, 9), (63, 63), (64, 70), (130, 130)]


def inputs(queries: int, keys: int, scale: float = 2.0) -> list[Tensor]:
    """q, k, v in float64, large enough for sharp weights."""
    shapes = [(SEQUENCES, HEADS, length, CHANNELS) for length in (queries, keys, keys)]
    return [scale * torch.randn(shape, dtype=torch.float64) for shape in shapes]


def mask(queries: int, keys: int) -> Tensor:
    documents = (torch.rand(SEQUENCES, keys) < 0.1).cumsum(-1)
    valid = torch.rand(SEQUENCES, keys) < 0.9
    return visible_positions(documents, valid, queries, keys, torch.device("cpu"))


def outcome(function: Any, tensors: list[Tensor], *arguments: Any) -> list[Tensor]:
    """Both results, and the gradients of a random function of both."""
    q, k, v = leaves(*tensors)
    torch.manual_seed(1)
    found = function(q, k, v, *arguments)
    loss = sum((part * torch.randn_like(part)).sum() for part in found)
    loss.backward()
    return [*found, q.grad, k.grad, v.grad]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_values_and_gradients_are_those_of_the_definition(
    masked: bool, queries: int, keys: int
) -> None:
    tensors = inputs(queries, keys)
    arguments = [mask(queries, keys)] if masked else []
    actual = outcome(entropy_attention, tensors, *arguments)
    expected = outcome(entropy_attention_reference, tensors, *arguments)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_flex_finds_the_same_values(masked: bool, queries: int, keys: int) -> None:
    """On the CPU it has no backward pass."""
    tensors = inputs(queries, keys)
    arguments = [mask(queries, keys)] if masked else []
    expected = entropy_attention_reference(*tensors, *arguments)
    for mine, theirs in zip(flex_entropy_attention(*tensors, *arguments), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_queries_anywhere_among_the_keys() -> None:
    queries, keys = 70, 100
    positions_BT = torch.rand(SEQUENCES, keys).argsort(-1)[:, :queries]
    tensors = inputs(queries, keys)
    expected = outcome(entropy_attention_reference, tensors, None, positions_BT)
    actual = outcome(entropy_attention, tensors, None, positions_BT)
    flex = flex_entropy_attention(*tensors, None, positions_BT)
    for mine, theirs in zip((*actual, *flex), (*expected, *expected[:2]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("which", [0, 1])
def test_either_result_alone_may_be_used(which: int) -> None:
    tensors = inputs(9, 9)
    gradients = []
    for function in (entropy_attention, entropy_attention_reference):
        q, k, v = leaves(*tensors)
        function(q, k, v)[which].square().sum().backward()
        gradients.append([q.grad, k.grad, torch.zeros_like(v) if v.grad is None else v.grad])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_entropy_of_equal_weights_and_of_a_single_key() -> None:
    q, k, v = inputs(5, 5)
    entropy_BHT = entropy_attention(torch.zeros_like(q), k, v).entropy_BHT
    expected_T = torch.tensor([math.log(n) for n in range(1, 6)], dtype=torch.float64)
    torch.testing.assert_close(entropy_BHT, expected_T.expand_as(entropy_BHT))
    assert (entropy_attention(q, k, v).entropy_BHT[..., 0] == 0).all()


def test_entropy_by_plain_probabilities() -> None:
    q, k, v = inputs(4, 4)
    for head in range(HEADS):
        scores = q[0, head] @ k[0, head].T / math.sqrt(CHANNELS)
        for t in range(4):
            weights = scores[t, : t + 1].softmax(-1)
            expected = -sum(float(p) * math.log(p) for p in weights)
            assert float(entropy_attention(q, k, v).entropy_BHT[0, head, t]) == pytest.approx(
                expected, abs=1e-13
            )


def test_weights_never_exist_for_more_queries_than_a_chunk(monkeypatch: Any) -> None:
    seen: list[int] = []
    whole = module._scores

    def watched(*arguments: Any) -> Any:
        for rows, scores, keys in whole(*arguments):
            seen.append(scores.shape[1])
            yield rows, scores, keys

    monkeypatch.setattr(module, "_scores", watched)
    outcome(entropy_attention, inputs(150, 150))
    assert seen == [64, 64, 22] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_lower_precision_is_near_and_entropy_stays_in_float32(
    dtype: torch.dtype, autocast: bool
) -> None:
    tensors = inputs(70, 70, 1.0)
    exact = entropy_attention_reference(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out, entropy = entropy_attention(*(x.to(dtype) for x in tensors))
    assert (out.dtype, entropy.dtype) == (dtype, torch.float32)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.double(), exact.out_BHTC, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropy.double(), exact.entropy_BHT, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_flex_on_a_gpu() -> None:
    tensors = [x.float().cuda() for x in inputs(130, 130)]
    visible = mask(130, 130).cuda()
    actual = outcome(flex_entropy_attention, tensors, visible)
    expected = outcome(entropy_attention_reference, tensors, visible)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=5e-3, atol=5e-3)
