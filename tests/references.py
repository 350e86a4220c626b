"""Plain-loop definitions that the tests compare with, and how tests compare.

Nothing here calls the code under test, apart from the one-expert networks that define the stacked
ones.
Letters: T tokens, E experts, K experts per token, D width.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sra_ds.config import Recipe
from sra_ds.config.model import FeedForwardConfig
from sra_ds.config.steering import Boost, Pin, Replace, Scale, Steering, Suppress, Towards
from sra_ds.inference.steer import steered
from sra_ds.model.language_model import build_model
from sra_ds.moe.experts import GroupedExperts, build_feed_forward
from sra_ds.moe.placement import Placement


class LoopRouting(NamedTuple):
    """What one router decided, found token by token."""

    gates_TK: Tensor
    expert_ids_TK: Tensor
    load_E: Tensor
    mean_probs_E: Tensor
    lse_T: Tensor
    valid_count: int


def top_k_loop(scores_E: Iterable[float], top_k: int) -> list[int]:
    """Ids by falling score, ties to the lower id, NaN last."""

    def rank(pair: tuple[int, float]) -> tuple[bool, float, int]:
        number, score = pair
        return (True, 0.0, number) if math.isnan(score) else (False, -score, number)

    return [number for number, _ in sorted(enumerate(scores_E), key=rank)][:top_k]


def gates_loop(scores_E: Tensor, ids: list[int], gate: str) -> Tensor:
    """Combine weights of one token."""
    probs_E = scores_E.exp() / scores_E.exp().sum()
    chosen_K = torch.stack([scores_E[e] for e in ids])
    probs_K = torch.stack([probs_E[e] for e in ids])
    if gate == "all":
        return probs_K if len(ids) == 1 else probs_K / (probs_K.sum() + 1e-6)
    if gate == "straight_through" and len(ids) == 1:
        return probs_K + (1.0 - probs_K).detach()
    return chosen_K.exp() / chosen_K.exp().sum()


def route_loop(
    scores_TE: Tensor,
    top_k: int,
    gate: str,
    valid_T: Tensor | None = None,
    selection_TE: Tensor | None = None,
) -> LoopRouting:
    """Route one token after the other."""
    selection_TE = scores_TE if selection_TE is None else selection_TE
    tokens, experts = scores_TE.shape
    valid = [True] * tokens if valid_T is None else valid_T.tolist()
    load = [0.0] * experts
    gates, ids, lses = [], [], []
    probs_sum_E = scores_TE.new_zeros(experts)
    for t in range(tokens):
        chosen = top_k_loop(selection_TE[t].tolist(), top_k)
        ids.append(chosen)
        gates.append(gates_loop(scores_TE[t], chosen, gate))
        lse = scores_TE[t].exp().sum().log()
        lses.append(lse if valid[t] else torch.zeros_like(lse))
        if valid[t]:
            probs_sum_E = probs_sum_E + (scores_TE[t] - lse).exp()
            for e in chosen:
                load[e] += 1.0
    return LoopRouting(
        torch.stack(gates),
        torch.tensor(ids),
        scores_TE.new_tensor(load),
        probs_sum_E / max(1, sum(valid)),
        torch.stack(lses),
        sum(valid),
    )


def cosine_scores_loop(x_TD: Tensor, anchors_ED: Tensor, temperature: Tensor) -> Tensor:
    """|tau_e| x.a_e / (|x| |a_e|), pair by pair."""
    rows = []
    for x_D in x_TD:
        row = []
        for e, anchor_D in enumerate(anchors_ED):
            cosine = x_D @ anchor_D / (x_D.square().sum().sqrt() * anchor_D.square().sum().sqrt())
            row.append(temperature[e % len(temperature)].abs() * cosine)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def linear_scores_loop(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """w_e.x (+ b_e), pair by pair."""
    rows = []
    for x_D in x_TD:
        row = [weight_D @ x_D for weight_D in weight_ED]
        if bias_E is not None:
            row = [score + bias for score, bias in zip(row, bias_E, strict=True)]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def hash_ids_loop(token_ids: list[int], experts: int, top_k: int) -> list[list[int]]:
    """The k experts with the smallest hash of (token, expert), in Python's integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 15)) * 0x2C1B3C6D) % 2**31
        x = ((x ^ (x >> 12)) * 0x297A2D39) % 2**31
        return x ^ (x >> 15)

    return [
        sorted(range(experts), key=lambda e, token=token: mix(token * experts + e))[:top_k]
        for token in token_ids
    ]


def unstack(stacked: GroupedExperts, config: FeedForwardConfig, width: int) -> list[nn.Module]:
    """The stacked experts as separate networks with copies of their weights."""
    networks = []
    for e in range(len(stacked.expert_ids)):
        network = build_feed_forward(config, width).to(stacked.up_weight.dtype)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                part, kind = name.split(".")
                source = getattr(stacked, f"{part}_{kind}")[e]
                parameter.copy_(source.T if kind == "weight" else source)
        networks.append(network)
    return networks


def stacked_gradients(networks: list[nn.Module]) -> dict[str, Tensor]:
    """Gradients of separate networks under the names and shapes of the stacked parameters; zero for
    a network that was never used."""
    gradients: dict[str, Tensor] = {}
    for name, _ in networks[0].named_parameters():
        rows = []
        for network in networks:
            parameter = network.get_parameter(name)
            row = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            rows.append(row.T if name.endswith("weight") else row)
        gradients[name.replace(".", "_")] = torch.stack(rows)
    return gradients


def moe_loop(
    x_TD: Tensor,
    gates_TK: Tensor,
    ids_TK: Tensor,
    networks: list[nn.Module],
    shared: nn.Module | None = None,
) -> Tensor:
    """out[t] = sum_k gate[t, k] * network[id[t, k]](x[t]) (+ shared(x[t])), route by route."""
    out = []
    for t, ids in enumerate(ids_TK.tolist()):
        y_D = sum(gates_TK[t, k] * networks[e](x_TD[t]) for k, e in enumerate(ids))
        out.append(y_D if shared is None else y_D + shared(x_TD[t]))
    return torch.stack(out)


def attention_loop(
    q_TC: Tensor, k_SC: Tensor, v_SC: Tensor, visible: Callable[[int, int], bool]
) -> Tensor:
    """Softmax attention of one head, query by query over the keys it may see."""
    out = []
    for t, q_C in enumerate(q_TC):
        seen = [s for s in range(len(k_SC)) if visible(t, s)]
        scores = torch.stack([q_C @ k_SC[s] for s in seen]) / math.sqrt(len(q_C))
        out.append(sum(w * v_SC[s] for w, s in zip(scores.softmax(0), seen, strict=True)))
    return torch.stack(out)


def rotate_loop(x_TC: Tensor, positions: list[int], theta: float) -> Tensor:
    """Rotary positions as complex numbers: pair (i, i + C/2) turns by position * theta^(-2i/C)."""
    half = x_TC.shape[1] // 2
    rows = []
    for x_C, position in zip(x_TC, positions, strict=True):
        pairs = torch.complex(x_C[:half], x_C[half:])
        angles = x_C.new_tensor([position * theta ** (-i / half) for i in range(half)])
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        rows.append(torch.cat([turned.real, turned.imag]))
    return torch.stack(rows)


@torch.no_grad()
def randomise(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """Every parameter, the anchors of control routers and persistent memory, from N(0, scale^2)."""
    for parameter in module.parameters():
        parameter.normal_(0.0, scale)
    for name, buffer in module.named_buffers():
        if name.endswith(("anchors", "start_state_HCC")):
            buffer.normal_(0.0, scale)
    return module


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Independent copies that collect gradients."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter by name; zeros where none arrived."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
    }


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance`, absolute and relative."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal names, and values within `tolerance`, absolute and relative."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda message, name=name: f"{name}: {message}",
        )


EVERY_EDIT = Steering(
    edits=(
        Suppress(layer=0, expert=1),
        Boost(layer=0, expert=2, by=0.5),
        Pin(layer=1, expert=0),
        Scale(layer=1, expert=3, by=0.25, renormalise=True),
        Scale(layer=0, expert=0, by=3.0),
        Towards(layer=1, expert=2, strength=0.5),
        Replace(layer=0, expert=3, output=0),
        Replace(layer=1, expert=1, output="zero"),
        Replace(layer=1, expert=2, output=tuple(0.1 * n for n in range(32))),
    )
)
"""Every kind of steering, for a model of two layers of four experts and width 32."""


@torch.no_grad()
def assert_steered_alike(
    recipe: Recipe, placements: Sequence[Placement], tolerance: float, device: str = "cpu"
) -> None:
    """Every edit acts, and with the same outcome wherever the experts are."""
    ids_BT = torch.arange(48, device=device).view(3, 16) * 5
    outputs = []
    for placement in placements:
        model = build_model(recipe, device, placement).eval()
        with steered(model, EVERY_EDIT):
            outputs.append(model(ids_BT).logits)
        assert (model(ids_BT).logits - outputs[-1]).abs().max() > 1e-3
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=tolerance, atol=tolerance)
