"""The sparse feed-forward network: its mask, its two ways to be stored, its control."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from references import assert_same, gradients
from sra_ds.config import Recipe
from sra_ds.config.model import DenseChannelConfig, PrimeMaskedChannelConfig
from sra_ds.errors import ConfigError
from sra_ds.model.channels.dense import DenseChannel
from sra_ds.model.channels.prime_masked import BlockLinear, MaskedLinear, PrimeMaskedChannel
from sra_ds.model.context import Context
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.training.engine import parameter_groups

Builder = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("poisoned_memory")
ANYWHERE: Any = Context(None, None, None, None, None)  # type: ignore[arg-type]


def model_with(tiny_recipe: Builder, kind: str = "gelu", **settings: Any) -> LanguageModel:
    feed_forward = {"kind": kind, "hidden": 24, "dropout": 0.0}
    channel = {"kind": "prime_masked", "feed_forward": feed_forward, "primes": [3, 5], **settings}
    recipe = tiny_recipe("dense", {"model": {"channel": channel}})
    return build_model(recipe)


def masks(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {
        name.removesuffix(".mask"): mask
        for name, mask in model.named_buffers()
        if name.endswith("mask")
    }


def test_a_weight_lives_where_a_prime_divides_the_distance(tiny_recipe: Builder) -> None:
    found = masks(model_with(tiny_recipe))
    assert len(found) == 4
    for name, mask in found.items():
        rows, columns = (24, 32) if name.endswith("up") else (32, 24)
        assert mask.shape == (rows, columns)
        for i in range(rows):
            for j in range(columns):
                assert bool(mask[i, j]) == ((i - j) % 3 == 0 or (i - j) % 5 == 0)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_blocks_and_masked_matrices_are_the_same_model(tiny_recipe: Builder, kind: str) -> None:
    """Equal at the start by construction: the same draws at the same places."""
    masked = model_with(tiny_recipe, kind).double()
    blocks = model_with(tiny_recipe, kind, storage="blocks").double()
    ids_BT = torch.randint(257, (3, 12))
    outputs = [model(ids_BT, ids_BT) for model in (masked, blocks)]
    torch.testing.assert_close(outputs[0].loss_sum, outputs[1].loss_sum, rtol=1e-12, atol=0)
    for output in outputs:
        output.loss_sum.backward()
    found = gradients(masked)
    for name, mask in masks(masked).items():
        full = found.pop(f"{name}.weight")
        assert (full[~mask] == 0).all()
        found[f"{name}.values"] = full[mask]
    assert_same(gradients(blocks), found, 1e-10)


def test_dead_weights_stay_dead(tiny_recipe: Builder) -> None:
    model = model_with(tiny_recipe)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(257, (2, 12)), torch.randint(257, (2, 12))).loss_sum.backward()
        optimizer.step()
    for name, mask in masks(model).items():
        weight = model.get_parameter(f"{name}.weight")
        assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()


def test_a_matrix_without_dead_weights_is_the_dense_network_to_the_bit() -> None:
    """Neutral: distance 0 alone is hit by a prime larger than the matrix; a mask of ones by no prime, so
    it is set by hand."""
    feed_forward = {"kind": "gelu", "hidden": 24}
    dense = DenseChannel(DenseChannelConfig(feed_forward=feed_forward), 16).eval()
    sparse = PrimeMaskedChannel(PrimeMaskedChannelConfig(feed_forward=feed_forward), 16).eval()
    with torch.no_grad():
        for name, linear in dense.feed_forward.named_children():
            own = sparse.feed_forward.get_submodule(name)
            own.weight.copy_(nn.init.normal_(linear.weight))
            own.bias.copy_(nn.init.normal_(linear.bias))
            own.mask.fill_(True)
    x_BTD = torch.randn(2, 5, 16)
    assert torch.equal(sparse(x_BTD, ANYWHERE)[0], dense(x_BTD, ANYWHERE)[0])


def test_rows_start_at_the_size_of_dense_ones(tiny_recipe: Builder) -> None:
    overlay = {
        "model": {
            "width": 256,
            "layers": 1,
            "channel": {"kind": "prime_masked", "feed_forward": {"kind": "gelu", "hidden": 1024}},
        }
    }
    up = build_model(tiny_recipe("dense", overlay)).blocks[0].channel.feed_forward.up
    norms_F = up.weight.norm(dim=1)
    torch.testing.assert_close(norms_F, torch.full_like(norms_F, 0.02 * 16), rtol=0.3, atol=0)
    assert float(norms_F.mean()) == pytest.approx(0.02 * 16, rel=0.01)


def test_random_places_are_as_many_in_each_row_and_others(tiny_recipe: Builder) -> None:
    prime = masks(model_with(tiny_recipe))
    random = masks(model_with(tiny_recipe, pattern="random"))
    other = masks(model_with(tiny_recipe, pattern="random", pattern_seed=1))
    again = masks(model_with(tiny_recipe, pattern="random"))
    first, *rest = prime
    for name in prime:
        assert torch.equal(random[name].sum(1), prime[name].sum(1))
        assert torch.equal(random[name], again[name])
        assert not torch.equal(random[name], prime[name])
        assert not torch.equal(random[name], other[name])
    assert not torch.equal(random[first], random[rest[1]])  # another layer, another draw


def test_the_mask_does_not_depend_on_the_run_seed(tiny_recipe: Builder) -> None:
    channel = {"kind": "prime_masked", "feed_forward": {"hidden": 24}, "pattern": "random"}
    found = [
        masks(
            build_model(
                tiny_recipe("dense", {"model": {"channel": channel}, "training": {"seed": s}})
            )
        )
        for s in (0, 1)
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_random_blocks_are_refused(tiny_recipe: Builder) -> None:
    with pytest.raises(ConfigError, match="a random mask has no blocks"):
        model_with(tiny_recipe, pattern="random", storage="blocks")


def test_live_weights_are_all_that_blocks_store(tiny_recipe: Builder) -> None:
    masked, blocks = model_with(tiny_recipe), model_with(tiny_recipe, storage="blocks")
    found = {name: m for name, m in masked.named_modules() if isinstance(m, MaskedLinear)}
    assert len(found) == 4
    for name, one in found.items():
        two = blocks.get_submodule(name)
        assert isinstance(two, BlockLinear)
        assert two.values.numel() == int(one.mask.sum()) == one.live == two.live
