"""The likeliest tokens and their mean vector, against the definition with all logits at once."""

import pytest
import torch
from torch import Tensor

from references import leaves
from sra_ds.ops.candidates import Candidates, candidates, mean_candidate, mean_candidate_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(tokens: int = 37, width: int = 6, vocabulary: int = 50) -> tuple[Tensor, Tensor]:
    u_ND = torch.randn(tokens, width, dtype=torch.float64)
    return u_ND, torch.randn(vocabulary, width, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 13, 100])
@pytest.mark.parametrize("count", [1, 7, 50])
def test_candidates_are_the_largest_logits_and_entropy_is_of_all(count: int, chunk: int) -> None:
    u_ND, weight_VD = inputs()
    found = candidates(u_ND, weight_VD, count, chunk)
    logits_NV = u_ND @ weight_VD.T
    logits_NM, ids_NM = logits_NV.topk(count)
    assert torch.equal(found.ids_NM, ids_NM)
    torch.testing.assert_close(found.logits_NM, logits_NM)
    probs_NV = logits_NV.softmax(-1)
    expected_N = torch.tensor([-sum(p * p.log() for p in row) for row in probs_NV])
    torch.testing.assert_close(found.entropy_N, expected_N.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("count", [1, 7, 50])
def test_mean_and_its_gradients_are_those_of_the_definition(count: int, tokens: int) -> None:
    outcomes, given = [], inputs(tokens)
    for reference in (False, True):
        u_ND, weight_VD = leaves(*given)
        torch.manual_seed(1)
        if reference:
            mean_ND = mean_candidate_reference(u_ND, weight_VD, count)
        else:
            found = candidates(u_ND, weight_VD, count, 10) if tokens else _nothing(count)
            mean_ND = mean_candidate(u_ND, weight_VD, found)
        (mean_ND * torch.randn_like(mean_ND)).sum().backward()
        outcomes.append((mean_ND, u_ND.grad, weight_VD.grad))
    for mine, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def _nothing(count: int) -> Candidates:
    logits = torch.empty(0, count, dtype=torch.float64)
    return Candidates(torch.empty(0, count, dtype=torch.int64), logits, logits[:, 0])


def test_bf16_states_give_bf16_means_and_float32_entropies() -> None:
    u_ND, weight_VD = (x.bfloat16() for x in inputs())
    found = candidates(u_ND, weight_VD, 7, 10)
    assert found.entropy_N.dtype == found.logits_NM.dtype == torch.float32
    mean_ND = mean_candidate(u_ND, weight_VD, found)
    assert mean_ND.dtype == torch.bfloat16
    exact_ND = mean_candidate_reference(u_ND.double(), weight_VD.double(), 7)
    torch.testing.assert_close(mean_ND.double(), exact_ND, rtol=0.05, atol=0.05)
