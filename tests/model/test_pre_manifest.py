"""The head that looks at its own distribution: what it starts as, what it computes, what it scores."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from references import randomise
from sra_ds.config import Recipe
from sra_ds.config.model import PreManifestHeadConfig
from sra_ds.model.heads.pre_manifest import PreManifestHead
from sra_ds.model.language_model import build_model
from sra_ds.ops.candidates import mean_candidate_reference

Builder = Callable[..., Recipe]
TOKENS, WIDTH, VOCABULARY = 40, 8, 60
HEAD = {"kind": "pre_manifest", "chunk_tokens": 13, "candidates": 5}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Table:
    """An embedding's side of a tied head."""

    def __init__(self) -> None:
        self.weight_VD = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)

    def output_factors(self, h_ND: Tensor) -> tuple[Tensor, Tensor]:
        return h_ND, self.weight_VD


def head(**settings: Any) -> PreManifestHead:
    settings = {"chunk_tokens": 13, "candidates": 5, **settings}
    made = randomise(PreManifestHead(PreManifestHeadConfig(**settings), WIDTH)).double()
    with torch.no_grad():
        made.logit_scale.fill_(0.8)
    return made


def by_hand(own: PreManifestHead, h_ND: Tensor, table: Table) -> tuple[Tensor, Tensor]:
    """Logits and the number of refinements, token by token."""
    rows, counts = [], []
    for h_D in h_ND:
        u_D, count = h_D, 0
        for _ in range(own.config.steps):
            probs_V = (own.logit_scale * u_D @ table.weight_VD.T).softmax(-1)
            if -(probs_V * probs_V.log()).sum() / math.log(VOCABULARY) < own.threshold:
                break
            mean_D = mean_candidate_reference(
                (own.logit_scale * u_D)[None], table.weight_VD, own.config.candidates
            )[0]
            moved_D = u_D + own.update_gate.sigmoid() * (own.move.weight @ mean_D)
            u_D, count = moved_D * u_D.norm() / moved_D.norm(), count + 1
        rows.append(own.logit_scale * u_D @ table.weight_VD.T)
        counts.append(count)
    return torch.stack(rows), torch.tensor(counts)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_logits_are_those_of_the_definition(steps: int) -> None:
    own, table = head(steps=steps, threshold=0.5), Table()
    h_ND = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    logits_NV, counts_N = by_hand(own, h_ND, table)
    found = own(h_ND, table)
    torch.testing.assert_close(found.logits_NV, logits_NV, rtol=1e-10, atol=1e-10)
    if steps:
        share = (counts_N > 0).double().mean()
        assert 0 < share < 1
        assert float(found.facts["step0_refined_share"]) == pytest.approx(float(share))


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_is_of_the_whole_normalised_last_distribution(training: bool) -> None:
    own, table = head(steps=2).train(training), Table()
    h_ND = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    targets_N = torch.randint(VOCABULARY, (TOKENS,))
    targets_N[::7] = -100
    logits_NV = own(h_ND, table).logits_NV
    log_probs_NV = logits_NV - torch.logsumexp(logits_NV, -1, keepdim=True)
    torch.testing.assert_close(log_probs_NV.exp().sum(-1), torch.ones(TOKENS, dtype=torch.float64))
    nll_N = -log_probs_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0] * (targets_N >= 0)
    with torch.set_grad_enabled(training):
        scored = own(h_ND, table, targets_N)
    torch.testing.assert_close(scored.nll_N, nll_N)
    torch.testing.assert_close(scored.loss_sum, nll_N.sum())


def test_gradients_are_those_of_the_definition() -> None:
    table, targets_N = Table(), torch.randint(VOCABULARY, (TOKENS,))
    h_ND = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    gradients = []
    for reference in (False, True):
        torch.manual_seed(0)
        own = head(steps=2, threshold=0.5).train()
        table.weight_VD = table.weight_VD.detach().requires_grad_()
        h_ND = h_ND.detach().requires_grad_()
        if reference:
            logits_NV = by_hand(own, h_ND, table)[0]
            loss = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
        else:
            loss = own(h_ND, table, targets_N).loss_sum
        loss.backward()
        given = [parameter.grad for parameter in own.parameters()]
        gradients.append([h_ND.grad, table.weight_VD.grad, *given])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["moe-cosine", "resonance"])
def test_at_its_start_it_is_the_tied_head_to_the_bit(tiny_recipe: Builder, family: str) -> None:
    ids_BT = torch.randint(257, (3, 16))
    outputs, gradients = [], []
    for kind in ({"kind": "tied", "chunk_tokens": 13}, {**HEAD, "steps": 2}):
        model = build_model(tiny_recipe(family, {"model": {"head": kind}}))
        output = model(ids_BT, ids_BT.roll(-1, 1))
        output.loss_sum.backward()
        gradients.append(model.blocks[0].mixer.qkv.weight.grad)
        outputs.append((model(ids_BT).logits, output.loss_sum, output.token_nll_BT))
    for mine, theirs in zip(*outputs, strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(
        *gradients, rtol=1e-4, atol=1e-6
    )  # the kept length rounds on its way


def test_deep_supervision_scores_the_distributions_before_the_last(tiny_recipe: Builder) -> None:
    overlay = {"model": {"head": {**HEAD, "steps": 2, "deep_supervision": True}}}
    model = randomise(build_model(tiny_recipe("moe-cosine", overlay)), 0.1).train()
    ids_BT = torch.randint(257, (3, 16))
    targets_BT = ids_BT.roll(-1, 1)
    early = model(ids_BT, targets_BT).penalties["supervision"]
    first = build_model(tiny_recipe("moe-cosine", {"model": {"head": {**HEAD, "steps": 0}}}))
    first.load_state_dict(
        {n: value for n, value in model.state_dict().items() if n in first.state_dict()}
    )
    plain = first(ids_BT, targets_BT)
    assert len(early) == 1
    assert early[0].item() != pytest.approx(plain.loss_sum.item(), rel=1e-6)
    model.head.threshold = 2.0  # nothing moves: every distribution is the first
    (still,) = model(ids_BT, targets_BT).penalties["supervision"]
    torch.testing.assert_close(still, plain.loss_sum)
    assert "supervision" not in model.eval()(ids_BT, targets_BT).penalties
