"""What the tests of every backend of the experts share: small layers, routings, one step by each."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from references import gradients, leaves
from sra_ds.config.model import MoEChannelConfig
from sra_ds.moe.routing import Routing

EXPERTS, WIDTH, EMPTY = 4, 8, 2
KINDS: list[dict[str, Any]] = [
    {"kind": "gelu", "hidden": 16, "dropout": 0.0},
    {"kind": "gelu", "hidden": 16, "dropout": 0.0, "bias": False},
    {"kind": "swiglu", "hidden": 16, "dropout": 0.0},
]
TOLERANCE = 2e-5
BF16_TOLERANCE = 2**-6
"""Of the largest value: two roundings to 8 bits."""

kinds = pytest.mark.parametrize("kind", KINDS, ids=["gelu", "gelu-no-bias", "swiglu"])


def config_of(kind: dict[str, Any], **fields: Any) -> MoEChannelConfig:
    tree = {"experts": EXPERTS, "top_k": 2, "expert": kind, **fields}
    return TypeAdapter(MoEChannelConfig).validate_python(tree)


def route_to(ids_TK: Tensor, gates_TK: Tensor) -> Routing:
    return Routing(gates_TK, ids_TK, torch.zeros(EXPERTS), *[torch.zeros(())] * 3)


def draw_ids(tokens: int, top_k: int, load: str = "mixed") -> Tensor:
    if load == "all_on_one":
        return torch.full((tokens, 1), EMPTY)
    scores_TE = torch.rand(tokens, EXPERTS)
    if load == "one_empty":
        scores_TE[:, EMPTY] = -1.0
    return scores_TE.topk(top_k).indices


def step(
    backend: nn.Module, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, weights_TD: Tensor
) -> dict[str, Tensor]:
    """Output and every gradient by name."""
    backend.zero_grad(set_to_none=True)
    x_TD, gates_TK = leaves(x_TD, gates_TK)
    out_TD = backend(x_TD, route_to(ids_TK, gates_TK))
    (out_TD * weights_TD).sum().backward()
    facts = {"out": out_TD.detach(), "x": x_TD.grad, "gates": gates_TK.grad}
    return {**facts, **gradients(backend)}


def compare(
    modules: list[nn.Module],
    tokens: int,
    top_k: int,
    load: str = "mixed",
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Tensor]]:
    """The same step by each module."""
    ids_TK, gates_TK = draw_ids(tokens, top_k, load), torch.rand(tokens, top_k)
    x_TD, weights_TD = torch.randn(2, tokens, WIDTH, dtype=dtype)
    return [step(module, x_TD, ids_TK, gates_TK, weights_TD) for module in modules]
