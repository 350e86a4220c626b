"""Propagation over hyperedges against diagonal matrices, token by token, and PyTorch Geometric."""

import warnings
from itertools import combinations

import pytest
import torch
from torch import Tensor

from references import assert_near, leaves
from sra_ds.ops.hypergraph import propagation, propagation_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def incidence(experts: int, size: int) -> Tensor:
    sets = list(combinations(range(experts), size))
    found = torch.zeros(experts, len(sets), dtype=torch.float64)
    for edge, members in enumerate(sets):
        found[list(members), edge] = 1
    return found


def some_experts(tokens: int, experts: int, top_k: int) -> Tensor:
    return torch.rand(tokens, experts).argsort(1)[:, :top_k]


@pytest.mark.parametrize(
    "experts, size, top_k", [(5, 2, 2), (5, 3, 4), (4, 4, 2), (3, 2, 3), (1, 1, 1)]
)
@pytest.mark.parametrize("tokens", [1, 63, 130])
def test_it_is_the_product_of_the_definition(
    tokens: int, experts: int, size: int, top_k: int
) -> None:
    fixed_EM = incidence(experts, size)
    open_EM, weights_M = leaves(
        torch.rand_like(fixed_EM), torch.rand(fixed_EM.shape[1], dtype=torch.float64) + 0.1
    )
    ids_TK = some_experts(tokens, experts, top_k)
    for incidence_EM in (fixed_EM, open_EM):
        found = []
        for function in (propagation, propagation_reference):
            mix_TKK = function(incidence_EM, weights_M, ids_TK)
            upstream = torch.linspace(-1, 1, mix_TKK.numel(), dtype=torch.float64)
            wanted = [leaf for leaf in (incidence_EM, weights_M) if leaf.requires_grad]
            gradients = torch.autograd.grad(mix_TKK.flatten() @ upstream, wanted)
            found.append([mix_TKK, *gradients])
        for actual, expected in zip(*found, strict=True):
            assert_near(actual, expected, 1e-10)


def test_weights_may_differ_from_token_to_token() -> None:
    incidence_EM, ids_TK = incidence(5, 2), some_experts(7, 5, 3)
    weights_TM = torch.rand(7, 10, dtype=torch.float64)
    together = propagation(incidence_EM, weights_TM, ids_TK)
    for token in range(7):
        alone = propagation(incidence_EM, weights_TM[token], ids_TK[token : token + 1])
        assert_near(together[token], alone[0], 1e-12)


def test_all_pairs_of_active_experts_average_over_rows_and_columns() -> None:
    mix_EE = propagation(
        incidence(6, 2), torch.ones(15, dtype=torch.float64), torch.arange(6).unsqueeze(0)
    )[0]
    ones = torch.ones(6, dtype=torch.float64)
    assert_near(mix_EE.sum(0), ones, 1e-12)
    assert_near(mix_EE.sum(1), ones, 1e-12)


def test_one_expert_alone_hears_itself_and_nothing_else() -> None:
    mix_TKK = propagation(incidence(1, 1), torch.rand(1).double() + 0.1, torch.zeros(3, 1).long())
    assert_near(mix_TKK, torch.ones(3, 1, 1, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_with_unit_weights_it_is_pytorch_geometrics(size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch_geometric.nn import HypergraphConv
    experts, width = 5, 8
    incidence_EM = incidence(experts, size)
    theirs = HypergraphConv(width, width, bias=False).double()
    h_ED = torch.randn(experts, width, dtype=torch.float64)
    node, edge = incidence_EM.nonzero(as_tuple=True)
    expected_ED = theirs(h_ED, torch.stack([node, edge]))
    every_1E = torch.arange(experts).unsqueeze(0)
    weights_M = torch.ones(incidence_EM.shape[1], dtype=torch.float64)
    mix_EE = propagation(incidence_EM, weights_M, every_1E)[0]
    assert_near(mix_EE @ theirs.lin(h_ED), expected_ED, 1e-10)


def test_bf16_weights_are_propagated_in_float32() -> None:
    ids_TK = some_experts(9, 5, 2)
    mix = propagation(incidence(5, 2).bfloat16(), torch.ones(10, dtype=torch.bfloat16), ids_TK)
    assert mix.dtype == torch.float32
