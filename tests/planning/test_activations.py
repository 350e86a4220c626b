"""The bytes a forward pass keeps, counted from what autograd saves."""

import pytest
import torch
from torch import Tensor, nn

from sra_ds.config import load_recipe
from sra_ds.data.loader import random_batch
from sra_ds.model.language_model import build_model
from sra_ds.ops.extension import extension, use_kernels
from sra_ds.planning.activations import activation_bytes
from sra_ds.planning.case import Case
from sra_ds.planning.shapes import Layout, read_shapes
from sra_ds.planning.zero import Zero

WINDOWS = 8


HARD = "{kind: resonance, heads: 4, halting: hard, threshold: 0.0}"
COMMON = ["training.batch_size=8", "training.micro_batch_size=0", "training.precision=fp32"]
NO_SCHEDULE = "training.top_k_schedule=[]"
SMALL_HEAD = ["data.tokenizer.vocab_size=300"]
SWIGLU = ["model.channel.expert.kind=swiglu", "model.channel.expert.hidden=96"]
VARIANTS = {
    "gelu": ("sra-small", []),
    "top 4 of 16": (
        "sra-small",
        ["model.channel.top_k=4", "model.channel.experts=16", NO_SCHEDULE],
    ),
    "dense": ("dense-small", []),
    "linear router": ("sra-small", ["model.channel.router.kind=linear"]),
    "swiglu": ("quickstart", [*SWIGLU]),
    "dropout": ("quickstart", ["model.channel.expert.dropout=0.1", "model.mixer.dropout=0.1"]),
    "wide": ("quickstart", ["model.width=256", "model.layers=3"]),
}
RESONANT = {
    "resonance-8m": ("resonance-8m", []),
    "soft": ("dense-small", ["model.mixer={kind: resonance, heads: 4}"]),
    "hard": ("dense-small", [f"model.mixer={HARD}"]),
    "more iterations": ("dense-small", ["model.mixer={kind: resonance, heads: 8, iterations: 5}"]),
    "fast": ("dense-small", ["model.memory={kind: fast, heads: 2, head_width: 64}"]),
    "persistent": ("dense-small", ["model.memory=persistent"]),
    "blocks": ("resonance-8m", ["model.channel.storage=blocks"]),
}


SPECTRAL = {
    "spectral": ("spectral-8m", []),
    "two levels": (
        "spectral-8m",
        ["model.mixer={kind: wavelet, heads: 6, levels: 2}", "model.width=240"],
    ),
    "gated bands": ("spectral-8m-conv", []),
    "plain convolution": ("spectral-8m-plain-conv", []),
    "waves": ("spectral-8m-waves", []),
    "factorised": ("spectral-8m-factorised", []),
    "polar": ("spectral-8m", ["model.embedding={kind: hybrid, coefficients: polar}"]),
}
OPENED = {
    "gnn": ("gnn-moe", []),
    "hgnn": ("hgnn-moe", []),
    "gated hyperedges": (
        "hgnn-moe",
        ["model.channel.coupling.token_gate=true", "model.channel.coupling.rounds=2"],
    ),
    "compared": ("moe-small", ["model.channel.compare_outputs=true"]),
    "ghosts": ("moe-small", ["model.channel.ghosts={count: 2, background: true}"]),
    "expert blocks": (
        "moe-small",
        [
            *("model.channel.experts=4", "model.channel.top_k=4"),
            "model.channel.expert_kind=block",
        ],
    ),
}


def saved_bytes(recipe) -> int:
    """Of one forward pass, every storage once, without the parameters."""
    model = build_model(recipe).train()
    model.recompute = recipe.training.activation_checkpointing
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    batch = random_batch(recipe, WINDOWS, 0)
    own |= {t.untyped_storage().data_ptr() for t in batch if t is not None}
    found: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor.detach()  # with its history it would keep itself

    def keep_inputs(module: nn.Module, inputs: tuple) -> None:
        for tensor in (i for i in inputs if isinstance(i, Tensor) and i.is_floating_point()):
            keep(tensor)

    if model.recompute:  # what is recomputed keeps its inputs out of autograd's sight
        for block in model.blocks:
            block.mixer.register_forward_pre_hook(keep_inputs)
            block.channel.register_forward_pre_hook(keep_inputs)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*batch)
    alive.clear()  # hooks and tensors hold one another
    return sum(found.values())


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", VARIANTS)
def test_kept_activations_are_what_autograd_saves(name, checkpointed, kernels):
    start, overrides = VARIANTS[name]
    own = [*COMMON, *SMALL_HEAD, *overrides]
    own.append(f"training.activation_checkpointing={str(checkpointed).lower()}")
    recipe = load_recipe(start, own)
    with use_kernels(kernels):
        compiled = "cpu" in extension().devices
        counted = saved_bytes(recipe)
    case = Case(recipe, read_shapes(recipe), Layout(1), Zero(), WINDOWS, 1, 4, "cpu", compiled)
    kept = activation_bytes(case).kept
    assert kept == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [*((name, "auto") for name in [*RESONANT, *OPENED, *SPECTRAL]), ("blocks", "reference")],
)
def test_kept_activations_of_the_other_families(name, kernels):
    start, overrides = {**RESONANT, **OPENED, **SPECTRAL}[name]
    recipe = load_recipe(start, [*COMMON, *SMALL_HEAD, *overrides])
    with use_kernels(kernels):
        counted, compiled = saved_bytes(recipe), "cpu" in extension().devices
    case = Case(recipe, read_shapes(recipe), Layout(1), Zero(), WINDOWS, 1, 4, "cpu", compiled)
    assert activation_bytes(case).kept == pytest.approx(counted, rel=0.05)
