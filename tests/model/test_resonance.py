"""The resonance mixer: iterations, halting, and what may and may not decide about them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from references import leaves, randomise
from sra_ds.config import Recipe
from sra_ds.config.model import ResonanceConfig
from sra_ds.losses import auxiliary_losses
from sra_ds.model.context import Context, document_positions, visible_positions
from sra_ds.model.facts import Facts
from sra_ds.model.language_model import build_model
from sra_ds.model.mixers.attention import Attention, rotary_angles, rotate
from sra_ds.model.mixers.resonance import Resonance

Builder = Callable[..., Recipe]
WIDTH, HEADS, LENGTH, ROWS = 12, 2, 9, 3
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def mixer(**settings: Any) -> Resonance:
    """Float64, at a scale at which weights are neither sharp nor flat and iterations differ."""
    config = ResonanceConfig(heads=HEADS, rope_theta=100.0, **settings)
    return randomise(Resonance(config, WIDTH), 0.35).double().eval()


def context(document_ids_BT: Tensor | None = None, valid_BT: Tensor | None = None) -> Context:
    ids_BT = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    every = torch.ones_like(ids_BT, dtype=torch.bool)
    visible = None
    if document_ids_BT is not None or valid_BT is not None:
        visible = visible_positions(document_ids_BT, valid_BT, LENGTH, LENGTH, ids_BT.device)
    positions_BT = document_positions(document_ids_BT, every if valid_BT is None else valid_BT)
    return Context(ids_BT, torch.arange(LENGTH), positions_BT, valid_BT, visible)


def inputs() -> Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)


def run(model: Resonance, x_BTD: Tensor, **given: Tensor) -> tuple[Tensor, Facts]:
    found: tuple[Tensor, Facts] = model(x_BTD, context(**given))
    return found


def by_hand(model: Resonance, x_BTD: Tensor, row: int, t: int) -> list[tuple[Tensor, float]]:
    """Output and relative entropy of every iteration of one token, head by head in plain loops."""
    channels = WIDTH // HEADS
    angles = rotary_angles(torch.arange(LENGTH), channels, 100.0)
    q, k, v = model.qkv(x_BTD[row]).view(LENGTH, 3, HEADS, channels).permute(1, 2, 0, 3)
    q, k = rotate(q, *angles), rotate(k, *angles)
    here = tuple(part[t : t + 1] for part in angles)
    q_HC, rows = q[:, t], []
    for number in range(model.iterations):
        outputs, entropies = [], []
        for head in range(HEADS):
            beta = (1 + math.log1p(math.exp(model.sharpening[head].item()))) ** number
            scores = torch.stack([q_HC[head] @ k[head, s] for s in range(t + 1)])
            weights = (beta * scores / math.sqrt(channels)).softmax(0)
            outputs.append(sum(weights[s] * v[head, s] for s in range(t + 1)))
            entropies.append(-sum(float(w) * math.log(w) for w in weights.detach()))
        most = math.log(t + 1)
        rows.append((torch.stack(outputs), sum(entropies) / HEADS / most if t else 0.0))
        retrieved = torch.stack(
            [outputs[head] @ model.retrieval_weight[head] for head in range(HEADS)]
        )
        gate = model.update_gate.sigmoid()[:, None]
        q_HC = q_HC + gate * rotate(retrieved[:, None], *here)[:, 0]
    return rows


@pytest.mark.parametrize("row_and_place", [(0, 0), (1, 4), (2, 8)], ids=str)
def test_soft_halting_is_the_weighted_mean_of_the_iterations(row_and_place) -> None:
    model, x_BTD = mixer(threshold=0.5, softness=0.2), inputs()
    y_BTD, facts = run(model, x_BTD)
    row, t = row_and_place
    left, count, mixed = 1.0, 0.0, 0.0
    found = by_hand(model, x_BTD, row, t)
    for number, (output_HC, entropy) in enumerate(found, 1):
        last = number == len(found)
        share = left * (1.0 if last else 1 / (1 + math.exp((entropy - 0.5) / 0.2)))
        mixed, count, left = mixed + share * output_HC, count + number * share, left - share
        halting = facts["halting"]
        assert float(halting.entropy_IBT[number - 1, row, t]) == pytest.approx(entropy, abs=1e-12)
    torch.testing.assert_close(y_BTD[row, t], model.out(mixed.flatten()), rtol=1e-10, atol=1e-10)
    assert float(facts["halting"].iterations_BT[row, t]) == pytest.approx(count, abs=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_hard_halting_takes_the_first_sharp_iteration(training: bool) -> None:
    model, x_BTD = mixer(halting="hard", threshold=0.45).train(training), inputs()
    y_BTD, facts = run(model, x_BTD)
    counts = set()
    for row in range(ROWS):
        for t in range(LENGTH):
            found = by_hand(model, x_BTD, row, t)
            sharp = [n for n, (_, entropy) in enumerate(found, 1) if entropy < 0.45]
            count = sharp[0] if sharp else len(found)
            expected = model.out(found[count - 1][0].flatten())
            torch.testing.assert_close(y_BTD[row, t], expected, rtol=1e-10, atol=1e-10)
            assert facts["halting"].iterations_BT[row, t] == count
            own_I = facts["halting"].entropy_IBT[:, row, t]
            entropies = own_I.new_tensor([entropy for _, entropy in found[:count]])
            torch.testing.assert_close(own_I[:count], entropies, rtol=1e-10, atol=1e-10)
            assert own_I[count:].isnan().all()
            counts.add(count)
    assert counts == {1, 2, 3}


def test_one_iteration_is_attention_to_the_bit(tiny_recipe: Builder) -> None:
    plain = build_model(tiny_recipe("moe-cosine"))
    once = {"model": {"mixer": {"kind": "resonance", "heads": 2, "iterations": 1}}}
    resonant = build_model(tiny_recipe("moe-cosine", once))
    assert type(plain.blocks[0].mixer) is Attention
    assert type(resonant.blocks[0].mixer) is Resonance
    assert plain.state_dict().keys() == resonant.state_dict().keys()
    ids_BT, doc_BT = torch.randint(257, (3, 16)), (torch.rand(3, 16) < 0.2).cumsum(-1)
    for documents in (None, doc_BT):
        outputs = []
        for model in (plain, resonant):
            model.zero_grad()
            output = model(ids_BT, ids_BT.roll(-1, 1), documents)
            output.loss_sum.backward()
            outputs.append((output.loss_sum, model.blocks[0].mixer.qkv.weight.grad.clone()))
        for mine, theirs in zip(*outputs, strict=True):
            assert torch.equal(mine, theirs)


def test_a_threshold_above_every_entropy_stops_after_one_and_zero_never() -> None:
    x_BTD = inputs()
    always = mixer(halting="hard")
    always.threshold = 1.0001
    found = run(always, x_BTD)[1]["halting"]
    assert (found.iterations_BT == 1).all()
    found = run(mixer(halting="hard", threshold=0.0), x_BTD)[1]["halting"]
    assert (found.iterations_BT == 3).all()


@pytest.mark.parametrize("halting", ["soft", "hard"])
def test_changing_one_token_alters_the_count_of_no_earlier_or_other_token(halting: str) -> None:
    model, x_BTD = mixer(halting=halting, threshold=0.45), inputs()
    before = run(model, x_BTD)[1]["halting"]
    changed = x_BTD.clone()
    changed[1, 5] += torch.randn(WIDTH, dtype=torch.float64)
    after = run(model, changed)[1]["halting"]
    untouched = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    untouched[1, 5:] = False
    for mine, theirs in zip(after, before, strict=True):
        equal = (mine == theirs) | (mine.isnan() & theirs.isnan())
        assert equal[..., untouched].all()
    assert not torch.equal(after.entropy_IBT[0], before.entropy_IBT[0])


def test_gradients_reach_the_update_of_the_query() -> None:
    model, x_BTD = mixer(), inputs()
    y_BTD, facts = run(model, x_BTD)
    (y_BTD.square().sum() + sum(facts["penalties"].values())).backward()
    for parameter in (model.retrieval_weight, model.update_gate, model.sharpening):
        assert (parameter.grad != 0).all()


def test_hard_gradients_are_those_of_the_iterations_taken() -> None:
    """Stopping tokens by hand gives the same gradient as leaving them out."""
    model, (x_BTD,) = mixer(halting="hard", threshold=0.45), leaves(inputs())
    y_BTD, facts = run(model, x_BTD)
    count_BT = facts["halting"].iterations_BT
    y_BTD.square().sum().backward()
    gathered = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    every = []
    for iterations in (1, 2, 3):  # all tokens, so many iterations
        model.threshold, model.iterations = 0.0, iterations
        every.append(run(model, x_BTD)[0])
    chosen = sum((count_BT == n)[..., None].double() * y for n, y in enumerate(every, 1))
    torch.testing.assert_close(chosen, y_BTD, rtol=1e-10, atol=1e-10)
    chosen.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gathered[name], parameter.grad, rtol=1e-8, atol=1e-8)


def test_sharpening_never_falls_below_one() -> None:
    """With the query kept, a later iteration is at least as sharp."""
    model = mixer(halting="soft")
    with torch.no_grad():
        model.update_gate.fill_(-1e4)
    entropy_IBT = run(model, inputs())[1]["halting"].entropy_IBT
    assert (entropy_IBT[1:] <= entropy_IBT[:-1] + 1e-12).all()
    assert (entropy_IBT[2] < entropy_IBT[0])[:, 1:].all()


def test_padding_has_no_count_and_no_part_in_the_penalties() -> None:
    model, x_BTD = mixer(), inputs()
    valid_BT = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    valid_BT[0, 6:] = valid_BT[2, 4:] = False
    facts = run(model, x_BTD, valid_BT=valid_BT)[1]
    count_BT, entropy_IBT = facts["halting"].iterations_BT, facts["halting"].entropy_IBT
    assert torch.equal(count_BT.isfinite(), valid_BT)
    assert torch.equal(entropy_IBT[0].isfinite(), valid_BT)
    penalties = facts["penalties"]
    torch.testing.assert_close(penalties["ponder"], count_BT[valid_BT].sum())
    torch.testing.assert_close(penalties["entropy"], entropy_IBT[-1][valid_BT].sum())


def test_penalties_enter_the_loss_with_their_weights(tiny_recipe: Builder) -> None:
    losses = {"ponder_weight": 0.5, "entropy_weight": 0.25, "memory_weight": 0.125}
    recipe = tiny_recipe("resonance", {"losses": losses})
    output = build_model(recipe)(torch.randint(257, (2, 16)))
    terms = auxiliary_losses(output.routings, output.penalties, recipe.losses, 2 * 16)
    assert {name: weight for name, (_, weight) in terms.items()} == {
        "ponder": 0.5,
        "entropy": 0.25,
        "memory": 0.125,
    }
    means = torch.stack([halting.iterations_BT.mean() for halting in output.haltings])
    torch.testing.assert_close(terms["ponder"][0], means.mean())


def test_a_text_of_one_token_is_legal() -> None:
    for halting in ("soft", "hard"):
        model = mixer(halting=halting)
        one = Context(
            torch.zeros(1, 1, dtype=torch.int64), torch.arange(1), torch.zeros(1, 1), None, None
        )
        y_BTD, facts = model(torch.randn(1, 1, WIDTH, dtype=torch.float64), one)
        assert y_BTD.isfinite().all() and (facts["halting"].entropy_IBT[0] == 0).all()
