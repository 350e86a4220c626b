"""T1-T11 of systems.md part B: what holds for every language model, whatever its parts."""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, ROUTED
from references import assert_same, gradients, randomise
from sra_ds.config import Recipe
from sra_ds.config.losses import LossesConfig
from sra_ds.losses import auxiliary_losses, total_loss
from sra_ds.model.context import DecodingState
from sra_ds.model.language_model import LanguageModel, ModelOutput, build_model
from sra_ds.training.engine import build_optimizer, parameter_groups, set_learning_rate

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Builder = Callable[..., Recipe]
VOCABULARY, LENGTH = 257, 12
UNDECAYED = (
    *("bias", "anchors", "temperature", "token_strength", "position_strength"),
    *("update_gate", "sharpening", "decay_logit", "logit_scale"),
    *("edge_logit_EE", "raw_weight_M", "membership_EM"),
    *("phase_VH", "frequency_shift_H", "mixing_logit", "learned_K", "choice_F"),
)
AUXILIARY = LossesConfig.model_validate(
    {"balance": {"kind": "cv2", "weight": 0.1}, "z_weight": 0.1}
)


@pytest.fixture
def unit_scale(tiny_recipe: Builder, family: str) -> LanguageModel:
    """Float64, parameters from N(0, 1), so that an effect cannot hide behind small weights."""
    return randomise(build_model(tiny_recipe(family))).double().eval()


def tokens(windows: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (windows, length))


def other_than(ids_BT: Tensor) -> Tensor:
    """Different tokens at every position."""
    return (ids_BT + torch.randint(1, VOCABULARY, ids_BT.shape)) % VOCABULARY


def assert_equal_logits(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def train_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, ids_BT: Tensor, targets_BT: Tensor
) -> ModelOutput:
    """One step on the mean loss with auxiliary terms; gradients stay for inspection."""
    optimizer.zero_grad(set_to_none=True)
    output = model(ids_BT, targets_BT)
    terms = auxiliary_losses(output.routings, output.penalties, AUXILIARY, output.token_count)
    total_loss(output.loss_sum / output.token_count, terms).backward()
    optimizer.step()
    return output


@pytest.mark.parametrize("first_changed", [1, LENGTH // 2, LENGTH - 1])
def test_t1_future_tokens_do_not_change_earlier_logits(
    unit_scale: LanguageModel, first_changed: int
) -> None:
    ids_BT = tokens()
    changed_BT = ids_BT.clone()
    changed_BT[:, first_changed:] = other_than(ids_BT)[:, first_changed:]
    base, changed = unit_scale(ids_BT).logits, unit_scale(changed_BT).logits
    assert_equal_logits(changed[:, :first_changed], base[:, :first_changed])
    assert (changed - base)[:, first_changed:].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("documents", [False, True])
def test_t1_logits_have_no_derivative_with_respect_to_later_or_foreign_tokens(
    unit_scale: LanguageModel, documents: bool
) -> None:
    doc_BT = (torch.arange(LENGTH) >= 5).long()[None] if documents else None
    inputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, found: tuple[Tensor, Any]) -> Any:
        inputs.append(found[0].detach().requires_grad_())
        return inputs[0], found[1]

    unit_scale.embedding.register_forward_hook(keep)
    logits_TV = unit_scale(tokens(1), document_ids_BT=doc_BT).logits[0]
    weights_V = torch.randn(VOCABULARY, dtype=torch.float64)
    for s in range(LENGTH):
        (gradient_BTD,) = torch.autograd.grad(
            logits_TV[s] @ weights_V, inputs[0], retain_graph=True
        )
        reached = gradient_BTD[0].abs().amax(-1) > 0
        first = 5 if documents and s >= 5 else 0
        assert reached.tolist() == [first <= t <= s for t in range(LENGTH)]


def test_t1b_an_earlier_document_does_not_change_a_later_one(unit_scale: LanguageModel) -> None:
    ids_BT = tokens()
    changed_BT = ids_BT.clone()
    changed_BT[:, :5] = other_than(ids_BT)[:, :5]
    doc_BT = (torch.arange(LENGTH) >= 5).long().expand(3, LENGTH)
    base = unit_scale(ids_BT, document_ids_BT=doc_BT).logits
    changed = unit_scale(changed_BT, document_ids_BT=doc_BT).logits
    assert_equal_logits(changed[:, 5:], base[:, 5:])
    joined, changed_joined = unit_scale(ids_BT).logits, unit_scale(changed_BT).logits
    assert (joined - changed_joined)[:, 5:].abs().amax(-1).min() > 1e-3


def test_t1b_a_document_reads_the_same_alone_as_after_another(unit_scale: LanguageModel) -> None:
    ids_BT = tokens()
    doc_BT = (torch.arange(LENGTH) >= 5).long().expand(3, LENGTH)
    joined = unit_scale(ids_BT, document_ids_BT=doc_BT).logits[:, 5:]
    assert_equal_logits(joined, unit_scale(ids_BT[:, 5:]).logits, 1e-9)


def test_t1b_boundaries_can_be_switched_off(tiny_recipe: Builder, family: str) -> None:
    recipe = tiny_recipe(family, {"model": {"document_boundaries": False}})
    model = randomise(build_model(recipe)).eval()
    ids_BT = tokens()
    doc_BT = (torch.arange(LENGTH) >= 5).long().expand(3, LENGTH)
    assert torch.equal(model(ids_BT).logits, model(ids_BT, document_ids_BT=doc_BT).logits)


def test_t2_other_rows_of_the_batch_change_nothing(unit_scale: LanguageModel) -> None:
    ids_BT = tokens(5)
    base = unit_scale(ids_BT).logits
    changed_BT = other_than(ids_BT)
    changed_BT[2] = ids_BT[2]
    assert_equal_logits(unit_scale(changed_BT).logits[2], base[2])
    assert_equal_logits(unit_scale(ids_BT[2:3]).logits[0], base[2])
    order = torch.tensor([3, 0, 4, 1, 2])
    assert_equal_logits(unit_scale(ids_BT[order]).logits, base[order])


@pytest.mark.parametrize("recompute", [False, True])
def test_t3_every_parameter_and_every_expert_gets_a_gradient_within_two_steps(
    tiny_recipe: Builder, family: str, recompute: bool
) -> None:
    model = build_model(tiny_recipe(family)).train()
    model.recompute = recompute
    for router in model.routers():
        if family == "moe-ghost":  # a sleeping one has no gradient
            router.ghost_alpha_G.fill_(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    reached = {name: torch.zeros(len(p), dtype=torch.bool) for name, p in model.named_parameters()}
    for _ in range(2):
        output = train_step(model, optimizer, tokens(16, 32), tokens(16, 32))
        assert all((routing.load_E > 0).all() for routing in output.routings)
        for name, gradient in gradients(model).items():
            assert gradient.isfinite().all(), name
            reached[name] |= gradient.flatten(1).any(1) if gradient.ndim > 1 else gradient != 0
    # rows are experts, anchors, tokens or channels; there is no exception to the rule
    assert [name for name, rows in reached.items() if not rows.all()] == []


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [5, 7], [1, 3, 8], [LENGTH - 1, 1]], ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_t4_decoding_in_chunks_equals_one_pass(
    unit_scale: LanguageModel, chunks: list[int], documents: bool
) -> None:
    ids_BT = tokens()
    doc_BT = (torch.rand(3, LENGTH) < 0.3).cumsum(-1) if documents else None
    expected = unit_scale(ids_BT, document_ids_BT=doc_BT).logits
    assert_equal_logits(decode(unit_scale, ids_BT, doc_BT, chunks), expected)


def test_t4_decoding_in_float32(tiny_recipe: Builder, family: str) -> None:
    model = build_model(tiny_recipe(family)).eval()
    ids_BT = tokens()
    assert_equal_logits(decode(model, ids_BT, None, [1, 4, 7]), model(ids_BT).logits, 1e-5)


def decode(
    model: LanguageModel, ids_BT: Tensor, doc_BT: Tensor | None, chunks: list[int]
) -> Tensor:
    state: DecodingState = model.new_state()
    parts, past = [], 0
    for size in chunks:
        part = slice(past, past + size)
        documents = None if doc_BT is None else doc_BT[:, part]
        parts.append(model(ids_BT[:, part], document_ids_BT=documents, state=state).logits)
        past += size
        assert state.length == past
    return torch.cat(parts, 1)


def test_t5_the_step_after_loading_is_equal_to_the_bit(tiny_recipe: Builder, family: str) -> None:
    overlay = {"training": {"seed": 1}}
    model, loaded = build_model(tiny_recipe(family)), build_model(tiny_recipe(family, overlay))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    for router in model.routers():
        if hasattr(router, "selection_bias_E"):
            router.selection_bias_E.normal_(0, 0.1)
    for _ in range(2):
        train_step(model, optimizer, tokens(), tokens())
    again = torch.optim.AdamW(parameter_groups(loaded, 0.1), lr=1e-2)
    loaded.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ids_BT, targets_BT = tokens(), tokens()
    torch.manual_seed(0)  # where a part draws
    first = train_step(model, optimizer, ids_BT, targets_BT)
    torch.manual_seed(0)
    second = train_step(loaded, again, ids_BT, targets_BT)
    assert torch.equal(first.loss_sum, second.loss_sum)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("side", ["left", "right"])
def test_t6_padding_changes_no_loss_statistic_logit_or_gradient(
    unit_scale: LanguageModel, side: str
) -> None:
    ids_BT, targets_BT = tokens(), tokens()
    targets_BT[1, :4] = -100
    begin = 4 if side == "left" else 0
    real = slice(begin, begin + LENGTH)
    padded_ids = tokens(3, LENGTH + 4)
    padded_targets = torch.full_like(padded_ids, -100)
    valid_BT = torch.zeros_like(padded_ids, dtype=torch.bool)
    padded_ids[:, real], padded_targets[:, real], valid_BT[:, real] = ids_BT, targets_BT, True

    bare = trained(unit_scale, ids_BT, targets_BT, None)
    padded = trained(unit_scale, padded_ids, padded_targets, valid_BT)
    assert bare[0].token_count == padded[0].token_count
    near = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(padded[0].loss_sum, bare[0].loss_sum, **near)
    for mine, expected in zip(padded[0].routings, bare[0].routings, strict=True):
        assert torch.equal(mine.load_E, expected.load_E)
        assert mine.valid_count == expected.valid_count
        torch.testing.assert_close(mine.mean_probs_E, expected.mean_probs_E, **near)
        torch.testing.assert_close(mine.lse_T.square().sum(), expected.lse_T.square().sum(), **near)
    assert_same(padded[1], bare[1], 1e-9)
    logits = unit_scale(padded_ids, valid_BT=valid_BT).logits[:, real]
    torch.testing.assert_close(logits, unit_scale(ids_BT).logits, **near)


def trained(
    model: LanguageModel, ids_BT: Tensor, targets_BT: Tensor, valid_BT: Tensor | None
) -> tuple[ModelOutput, dict[str, Tensor]]:
    """Output and gradients of the mean loss with auxiliary terms."""
    model.zero_grad(set_to_none=True)
    output = model(ids_BT, targets_BT, valid_BT=valid_BT)
    terms = auxiliary_losses(output.routings, output.penalties, AUXILIARY, output.token_count)
    total_loss(output.loss_sum / output.token_count, terms).backward()
    return output, gradients(model)


@pytest.mark.parametrize("training", [True, False])
def test_t7_a_pass_leaves_the_state_as_it_was(
    tiny_recipe: Builder, family: str, training: bool
) -> None:
    model = build_model(tiny_recipe(family)).train(training)
    before = copy.deepcopy(model.state_dict())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    everything = {name: value.detach().clone() for name, value in tensors}
    model(tokens(), tokens())
    with torch.no_grad():
        model(tokens(), tokens(), keep_scores=True)
        model(tokens(), state=model.new_state())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, everything[name]) for name, value in tensors)


def test_t8_the_first_loss_is_that_of_guessing(tiny_recipe: Builder, family: str) -> None:
    model = build_model(tiny_recipe(family)).eval()
    output = model(tokens(16, 32), tokens(16, 32))
    mean = float(output.loss_sum.detach() / output.token_count)
    assert mean == pytest.approx(math.log(VOCABULARY), abs=0.1)


@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_t9_bf16_is_finite_and_routes_in_float32(
    tiny_recipe: Builder, family: str, how: str
) -> None:
    model = build_model(tiny_recipe(family)).train()
    if how == "cast":
        model.bfloat16()
    exact = copy.deepcopy(model).float()
    inputs: list[Tensor] = []
    for router in model.routers():
        router.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        output = model(tokens(), tokens(), keep_scores=True)
        terms = auxiliary_losses(output.routings, output.penalties, AUXILIARY, output.token_count)
        total_loss(output.loss_sum / output.token_count, terms).backward()
    assert output.loss_sum.dtype == output.token_nll_BT.dtype == torch.float32
    assert output.loss_sum.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    for router, x_TD, routing in zip(exact.routers(), inputs, output.routings, strict=True):
        facts = (routing.scores_TE, routing.gates_TK, routing.mean_probs_E, routing.lse_T)
        assert {fact.dtype for fact in facts} == {torch.float32}
        if "hash" not in family:
            scores_TE = router(x_TD.float(), keep_scores=True).scores_TE
            torch.testing.assert_close(routing.scores_TE, scores_TE, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_t9_bf16_logits_are_near_float32(tiny_recipe: Builder, family: str, how: str) -> None:
    model = build_model(tiny_recipe(family)).eval()
    ids_BT = tokens()
    exact = model(ids_BT).logits
    if how == "cast":
        model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        logits = model(ids_BT).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.02)


def test_t10_one_batch_is_learnt_by_heart(tiny_recipe: Builder, family: str) -> None:
    model = build_model(tiny_recipe(family)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids_BT, targets_BT = tokens(4, 16), tokens(4, 16)
    for _ in range(120):
        optimizer.zero_grad(set_to_none=True)
        output = model(ids_BT, targets_BT)
        (output.loss_sum / output.token_count).backward()
        optimizer.step()
    with torch.no_grad():
        output = model.eval()(ids_BT, targets_BT)
    assert output.loss_sum / output.token_count < 0.05
    assert output.correct_BT is not None and output.correct_BT.all()


def test_t11_the_optimizer_owns_every_parameter_once_and_decays_matrices_only(
    tiny_recipe: Builder, family: str
) -> None:
    model = build_model(tiny_recipe(family))
    groups = parameter_groups(model, 0.1)
    owned = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert len(owned) == len(set(owned)) and set(owned) == set(trainable)
    decayed = {trainable[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    spared = set(trainable.values()) - decayed
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    for name in trainable.values():
        small = name.endswith(UNDECAYED) or "norm" in name or "ghost" in name
        assert (name in spared) == small, name
    assert any(name.startswith("embedding.") for name in decayed)
    if family == "moe-cosine":
        router, experts = "blocks.0.channel.moe.router", "blocks.0.channel.moe.backend.experts"
        assert {f"{router}.anchors", f"{router}.temperature"} <= spared
        assert {f"{experts}.up_bias", f"{experts}.down_bias"} <= spared
        assert {f"{experts}.up_weight", f"{experts}.down_weight"} <= decayed


def test_t11_frozen_parameters_are_left_out(tiny_recipe: Builder, family: str) -> None:
    model = build_model(tiny_recipe(family))
    model.embedding.weight.requires_grad_(False)
    owned = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert id(model.embedding.weight) not in owned
    assert len(owned) == len(list(model.parameters())) - 1


def test_recomputation_changes_no_bit_of_a_step_and_never_routes_again(
    tiny_recipe: Builder, family: str
) -> None:
    model = build_model(tiny_recipe(family)).train()
    calls = dict.fromkeys(("router", "mixer", "experts"), 0)

    def count(name: str, module: nn.Module) -> None:
        def hook(*_: Any) -> None:
            calls[name] += 1

        module.register_forward_pre_hook(hook)

    for block in model.blocks:
        count("mixer", block.mixer)
        routed = family in ROUTED
        experts = block.channel.moe.backend.experts if routed else block.channel.feed_forward
        count("experts", experts)
    for router in model.routers():
        count("router", router)
    layers, routers = len(model.blocks), len(model.routers())
    ids_BT, targets_BT = tokens(), tokens()
    torch.manual_seed(0)  # where a part draws
    kept = trained(model, ids_BT, targets_BT, None)
    assert calls == {"router": routers, "mixer": layers, "experts": layers}
    model.recompute = True
    torch.manual_seed(0)
    recomputed = trained(model, ids_BT, targets_BT, None)
    assert calls == {"router": 2 * routers, "mixer": 3 * layers, "experts": 3 * layers}
    assert torch.equal(kept[0].loss_sum, recomputed[0].loss_sum)
    assert all(torch.equal(recomputed[1][name], value) for name, value in kept[1].items())


def test_losses_are_those_of_the_logits(tiny_recipe: Builder, family: str) -> None:
    model = build_model(tiny_recipe(family)).eval()
    ids_BT, targets_BT = tokens(), tokens()
    targets_BT[0, 3:] = -100
    logits = model(ids_BT).logits
    counted_BT = targets_BT != -100
    nll_BT = -logits.log_softmax(-1).gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0]
    expected_BT = nll_BT * counted_BT
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            output = model(ids_BT, targets_BT)
        assert output.token_count == counted_BT.sum()
        torch.testing.assert_close(output.token_nll_BT, expected_BT, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.loss_sum, expected_BT.sum(), rtol=1e-5, atol=1e-4)
    assert torch.equal(output.correct_BT, logits.argmax(-1) == targets_BT)


def test_facts_and_routings_are_reported_per_layer(tiny_recipe: Builder, family: str) -> None:
    model = build_model(tiny_recipe(family)).eval()
    output = model(tokens())
    routed = family in ROUTED
    assert len(output.routings) == len(model.routers()) == (2 if routed else 0)
    names = {f"layer{layer}/{fact}" for layer in (0, 1) for fact in ("stream_rms", "channel_rms")}
    assert names == {fact for fact in output.facts if fact.endswith(("stream_rms", "channel_rms"))}
    assert all(output.facts[name] > 0 for name in names)
    assert not any(fact.requires_grad or fact.ndim for fact in output.facts.values())
    linear = ("moe-linear", "moe-hash", "moe-gnn")
    assert len(output.anchor_grams) == (2 if routed and family not in linear else 0)
    assert output.saturations == []
    assert len(model.train()(tokens()).saturations) == (2 if family == "moe-ghost" else 0)
    assert len(output.haltings) == (2 if family.startswith("resonance") else 0)
    assert len(output.memory_states_HCC) == (2 if family == "resonance-moe" else 0)


@pytest.mark.parametrize("router", ["cosine", "linear", "random"])
def test_anchors_may_have_a_learning_rate_of_their_own(tiny_recipe: Builder, router: str) -> None:
    asked = {"training": {"optimizer": {"kind": "adamw", "anchor_rate": 0.25}}}
    moe = {"model": {"channel": {**FAMILIES["moe-cosine"]["channel"], "router": {"kind": router}}}}
    recipe = tiny_recipe("moe-cosine", {**asked, **moe})
    model = build_model(recipe)
    optimizer = build_optimizer(model, recipe)
    set_learning_rate(SimpleNamespace(optimizer=optimizer), 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    own = {"cosine": "anchors", "linear": "weight"}.get(router, "nothing")
    for name, parameter in model.named_parameters():
        expected = 0.025 if name.endswith(f"router.{own}") else 0.1
        assert rates[id(parameter)] == pytest.approx(expected), name
