"""How alike the outputs of a token's experts are."""

import pytest
import torch
from torch import Tensor

from references import assert_near, leaves
from sra_ds.ops.output_overlap import output_overlap, output_overlap_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def routes(tokens: int, top_k: int, width: int = 6) -> Tensor:
    return torch.randn(tokens, top_k, width, dtype=torch.float64)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 63, 130])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_mean_squared_cosine_of_pairs(tokens: int, top_k: int, padded: bool) -> None:
    rows_TKD = routes(tokens, top_k)
    valid_T = torch.arange(tokens) % 3 != 1 if padded else None
    found = []
    for function in (output_overlap, output_overlap_reference):
        (leaf,) = leaves(rows_TKD)
        overlap_T = function(leaf, valid_T)
        overlap_T.sum().backward()
        found.append((overlap_T, leaf.grad))
    for actual, expected in zip(*found, strict=True):
        assert_near(actual, expected, 1e-9)


def test_it_is_1_for_the_same_outputs_and_0_for_orthogonal_ones() -> None:
    same_TKD = routes(40, 1).expand(-1, 3, -1)
    assert_near(output_overlap(same_TKD), torch.ones(40, dtype=torch.float64), 1e-12)
    apart_TKD = torch.zeros(40, 3, 6, dtype=torch.float64)
    for expert in range(3):
        part = torch.randn(40, 2, dtype=torch.float64)
        apart_TKD[:, expert, 2 * expert : 2 * expert + 2] = part - part.mean(0)
    assert output_overlap(apart_TKD).abs().max() < 1e-12


def test_size_and_what_all_experts_always_say_do_not_count() -> None:
    rows_TKD = routes(50, 3)
    base = output_overlap(rows_TKD)
    always_D = 100 * torch.randn(6, dtype=torch.float64)
    assert_near(output_overlap(7 * rows_TKD + always_D), base, 1e-9)
    sometimes_TKD = rows_TKD + torch.randn(50, 1, 6, dtype=torch.float64)
    assert not torch.allclose(output_overlap(sometimes_TKD), base)


def test_padding_counts_nowhere() -> None:
    rows_TKD = routes(30, 2)
    alone_T = output_overlap(rows_TKD[:20])
    rows_TKD[20:] *= 1e3
    padded_T = output_overlap(rows_TKD, torch.arange(30) < 20)
    assert_near(padded_T[:20], alone_T, 1e-12)
    assert (padded_T[20:] == 0).all()


def test_bf16_outputs_are_compared_in_float32() -> None:
    assert output_overlap(routes(30, 2).bfloat16()).dtype == torch.float32
