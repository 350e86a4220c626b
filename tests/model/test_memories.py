"""Memories: each starts as if it were not there, keeps documents and rows apart, and is never written by
a forward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from references import randomise
from sra_ds.config import Recipe
from sra_ds.config.model import StaticMemoryConfig
from sra_ds.model.context import Context, document_positions
from sra_ds.model.language_model import build_model
from sra_ds.model.memories.fast import write_memories
from sra_ds.model.memories.static import StaticMemory, slot_usage
from sra_ds.ops.delta_rule import delta_rule_reference
from sra_ds.training.controllers import build_controllers
from sra_ds.training.controllers.protocol import Seen

Builder = Callable[..., Recipe]
STATIC = {"kind": "static", "slots": 8, "best": 3, "key_width": 8, "value_width": 6, "rank": 3}
FAST = {"kind": "fast", "heads": 2, "head_width": 8}
PERSISTENT = {**FAST, "kind": "persistent", "write_rate": 0.25}
MEMORIES = {"static": STATIC, "fast": FAST, "persistent": PERSISTENT}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def recipe_with(tiny_recipe: Builder, memory: dict[str, Any]) -> Recipe:
    return tiny_recipe("dense", {"model": {"memory": memory}})


def tokens(*shape: int) -> Tensor:
    return torch.randint(257, shape or (3, 12))


def context(document_ids_BT: Tensor, valid_BT: Tensor | None = None) -> Context:
    every = torch.ones_like(document_ids_BT, dtype=torch.bool)
    positions_BT = document_positions(document_ids_BT, every if valid_BT is None else valid_BT)
    return Context(
        document_ids_BT, torch.arange(positions_BT.shape[1]), positions_BT, valid_BT, None
    )


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_it_starts_as_the_model_without_it_to_the_bit(tiny_recipe: Builder, memory: Any) -> None:
    ids_BT = tokens()
    plain, own = build_model(tiny_recipe("dense")), build_model(recipe_with(tiny_recipe, memory))
    mine, theirs = own(ids_BT, ids_BT), plain(ids_BT, ids_BT)
    assert torch.equal(own(ids_BT).logits, plain(ids_BT).logits)
    assert torch.equal(mine.loss_sum, theirs.loss_sum)
    mine.loss_sum.backward(), theirs.loss_sum.backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, own.get_parameter(name).grad), name


def test_a_static_memory_is_a_change_of_weights() -> None:
    """y = W x with W = A diag(m) B, and m from the slots whose keys lie nearest."""
    memory = randomise(StaticMemory(StaticMemoryConfig(**STATIC), 16)).double()
    x_BTD = torch.randn(2, 5, 16, dtype=torch.float64)
    y_BTD, facts = memory(x_BTD, context(torch.zeros(2, 5, dtype=torch.int64)))
    sizes = []
    for b in range(2):
        for t in range(5):
            key = memory.key.weight @ x_BTD[b, t]
            cosines_S = torch.stack(
                [key @ slot / (key.norm() * slot.norm()) for slot in memory.router.anchors]
            )
            best = cosines_S.argsort(descending=True)[:3]
            shares = (memory.router.temperature.abs() * cosines_S[best]).softmax(0)
            read = sum(share * memory.values[s] for share, s in zip(shares, best, strict=True))
            m = memory.adapter.weight @ read + memory.adapter.bias
            weight_DD = memory.up.weight @ torch.diag(m) @ memory.down.weight
            torch.testing.assert_close(y_BTD[b, t], weight_DD @ x_BTD[b, t], rtol=1e-9, atol=1e-9)
            sizes.append(m.square().sum())
    torch.testing.assert_close(facts["penalties"]["memory"], torch.stack(sizes).sum())


def test_usage_of_slots() -> None:
    facts = slot_usage(torch.tensor([4.0, 4.0, 0.0, 0.0]))
    assert float(facts["slot_entropy"]) == pytest.approx(0.5)
    assert float(facts["unread_slots"]) == 0.5
    assert float(slot_usage(torch.ones(4))["slot_entropy"]) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["fast", "persistent"])
def test_fast_weights_are_the_delta_rule_of_each_document(tiny_recipe: Builder, kind: str) -> None:
    model = randomise(build_model(recipe_with(tiny_recipe, MEMORIES[kind]))).double()
    memory = model.blocks[0].memory
    documents_BT = (torch.rand(3, 12) < 0.3).cumsum(-1)
    valid_BT = torch.rand(3, 12) < 0.8
    own = context(documents_BT, valid_BT)
    x_BTD = torch.randn(3, 12, 32, dtype=torch.float64)
    y_BTD, facts = memory(x_BTD, own)
    q, k, v = (part.unflatten(-1, (2, 8)) for part in memory.qkv(x_BTD).chunk(3, -1))
    found = delta_rule_reference(
        q / q.norm(dim=-1, keepdim=True),
        k / k.norm(dim=-1, keepdim=True),
        v,
        memory.write(x_BTD).sigmoid(),
        memory.decay_logit.sigmoid(),
        own.starts_BT,
        valid_BT,
        None,
        memory.start_state_HCC,
    )
    expected_BTD = found.y_BTHV.flatten(2) @ memory.out.weight.T
    torch.testing.assert_close(y_BTD[valid_BT], expected_BTD[valid_BT], rtol=1e-9, atol=1e-9)
    if kind == "persistent":
        torch.testing.assert_close(facts["memory_state"], found.state_BHVC.mean(0))
        assert not facts["memory_state"].requires_grad
    assert ("memory_state" in facts) == (kind == "persistent")


def test_only_the_controller_writes_a_persistent_memory(tiny_recipe: Builder) -> None:
    recipe = recipe_with(tiny_recipe, PERSISTENT)
    model = randomise(build_model(recipe)).train()
    before = [memory.start_state_HCC.clone() for memory in model.persistent_memories()]
    output = model(tokens(), tokens())
    output.loss_sum.backward()
    for memory, state in zip(model.persistent_memories(), before, strict=True):
        assert torch.equal(memory.start_state_HCC, state)
    controllers = build_controllers(recipe, model)
    assert set(controllers) == {"memory"}
    controllers["memory"].on_step_start(0)
    controllers["memory"].on_step_end(0, Seen(memory_states_HCC=output.memory_states_HCC))
    for memory, state, seen in zip(
        model.persistent_memories(), before, output.memory_states_HCC, strict=True
    ):
        torch.testing.assert_close(memory.start_state_HCC, 0.75 * state + 0.25 * seen)


def test_what_is_written_is_read_by_every_later_document(tiny_recipe: Builder) -> None:
    model = randomise(build_model(recipe_with(tiny_recipe, PERSISTENT))).double().eval()
    ids_BT, documents_BT = tokens(), (torch.arange(12) >= 5).long().expand(3, 12)
    before = model(ids_BT, document_ids_BT=documents_BT)
    write_memories(model.persistent_memories(), before.memory_states_HCC)
    after = model(ids_BT, document_ids_BT=documents_BT)
    assert ((after.logits - before.logits).abs().amax(-1) > 1e-6).all()


def test_a_persistent_memory_is_saved_and_stays_in_float32(tiny_recipe: Builder) -> None:
    model = randomise(build_model(recipe_with(tiny_recipe, PERSISTENT)))
    names = [name for name in model.state_dict() if name.endswith("start_state_HCC")]
    assert len(names) == 2
    kept = model.get_buffer(names[0]).clone()
    model.bfloat16()
    assert model.get_buffer(names[0]).dtype == torch.float32
    assert torch.equal(model.get_buffer(names[0]), kept)
    assert model.blocks[0].memory.qkv.weight.dtype == torch.bfloat16


def test_a_slow_decay_keeps_its_gradient_in_bf16(tiny_recipe: Builder) -> None:
    """sigmoid of a bf16 number near 7 would round to 1."""
    model = build_model(recipe_with(tiny_recipe, {**FAST, "decay": 0.999}))
    memory = model.blocks[0].memory
    with torch.no_grad():
        memory.out.weight.normal_()
    model.bfloat16()
    ids_BT = tokens()
    output = model(ids_BT, ids_BT)
    assert float(output.facts["layer0/memory_decay"]) == pytest.approx(0.999, abs=1e-4)
    output.loss_sum.backward()
    assert (memory.decay_logit.grad != 0).all()
