"""Experts that are blocks against blocks one by one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from references import (
    assert_near,
    attention_loop,
    gradients,
    leaves,
    randomise,
    rotate_loop,
    unstack,
)
from sra_ds.config import Recipe
from sra_ds.model.context import Context
from sra_ds.model.expert_blocks import THETA, StackedBlocks
from sra_ds.model.language_model import build_model

Builder = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("poisoned_memory")
EXPERTS, WIDTH, HEADS = 4, 32, 2


def blocks_of(tiny_recipe: Builder) -> StackedBlocks:
    model = randomise(build_model(tiny_recipe("moe-block")), 0.3).double()
    experts: StackedBlocks = model.routed_layers()[0].backend.experts
    return experts


def context_of(x_BTD: Tensor) -> Context:
    batch, length, _ = x_BTD.shape
    ids_BT = torch.zeros(batch, length, dtype=torch.int64)
    return Context(ids_BT, torch.arange(length), ids_BT, None, None)


def block_loop(blocks: StackedBlocks, expert: int, x_TD: Tensor) -> Tensor:
    """One expert on one sequence; what it adds to its input."""
    qkv_T3D = (x_TD @ blocks.qkv_weight[expert] + blocks.qkv_bias[expert]).view(-1, 3, WIDTH)
    channels, heads = WIDTH // HEADS, []
    positions = list(range(len(x_TD)))
    for head in range(HEADS):
        own = slice(head * channels, (head + 1) * channels)
        q, k, v = (qkv_T3D[:, part, own] for part in range(3))
        q, k = (rotate_loop(part, positions, THETA) for part in (q, k))
        heads.append(attention_loop(q, k, v, lambda t, s: s <= t))
    attended = torch.cat(heads, 1) @ blocks.out_weight[expert] + blocks.out_bias[expert]
    normed = F.layer_norm(x_TD + attended, (WIDTH,))
    normed = normed * blocks.norm_scale[expert] + blocks.norm_bias[expert]
    up, down = blocks.feed_forward.up_weight[expert], blocks.feed_forward.down_weight[expert]
    hidden = F.gelu(normed @ up + blocks.feed_forward.up_bias[expert], approximate="tanh")
    return attended + hidden @ down + blocks.feed_forward.down_bias[expert]


def test_stacked_blocks_are_blocks_one_by_one(tiny_recipe: Builder) -> None:
    blocks = blocks_of(tiny_recipe)
    x_BTD = torch.randn(3, 7, WIDTH, dtype=torch.float64)
    weights_NED = torch.randn(21, EXPERTS, WIDTH, dtype=torch.float64)
    found = []
    for stacked in (True, False):
        blocks.zero_grad(set_to_none=True)
        (leaf,) = leaves(x_BTD)
        if stacked:
            out_NED = blocks(leaf, context_of(leaf))
        else:
            rows = [[block_loop(blocks, e, x_TD) for e in range(EXPERTS)] for x_TD in leaf]
            out_NED = torch.cat([torch.stack(own, 1) for own in rows])
        (out_NED * weights_NED).sum().backward()
        found.append((out_NED, leaf.grad, gradients(blocks)))
    for actual, expected in zip(found[0][:2], found[1][:2], strict=True):
        assert_near(actual, expected, 1e-9)
    for name, expected in found[1][2].items():
        assert_near(found[0][2][name], expected, 1e-8)
        assert expected.flatten(1).any(1).all(), name


def test_the_layer_weighs_all_experts_by_their_gates(tiny_recipe: Builder) -> None:
    """Uncoupled, the channel is the sum of gate times output over every expert."""
    recipe = tiny_recipe("moe-block", {"model": {"channel": {"coupling": "none"}}})
    model = randomise(build_model(recipe), 0.3).double()
    channel = model.blocks[0].channel
    x_BTD = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    out_BTD, facts = channel(x_BTD, context_of(x_BTD))
    routing = facts["routing"]
    assert sorted(routing.expert_ids_TK[0].tolist()) == list(range(EXPERTS))
    outputs_NED = channel.moe.backend.experts(x_BTD, context_of(x_BTD))
    gates_NE = torch.zeros(10, EXPERTS, dtype=torch.float64)
    gates_NE.scatter_(1, routing.expert_ids_TK, routing.gates_TK)
    expected = torch.einsum("ne,ned->nd", gates_NE, outputs_NED).view_as(x_BTD)
    assert_near(out_BTD, expected, 1e-10)
    assert (
        len(unstack(channel.moe.backend.experts.feed_forward, recipe.model.channel.expert, 32)) == 4
    )
