"""Cosine top-k routing: tokens and anchors in, gates, ids and statistics out, as one operator.

    s_te = |tau_e| * x_t . a_e / (|x_t| |a_e|),    then `top_k_routing` of the scores

    cosine_route            the compiled operator, where the extension is there and takes these inputs
    cosine_route_reference  the torch functions that define it

The compiled operator multiplies raw vectors and scales the float32 dot products, so bf16 vectors are not
rounded again, and its gradients are in closed form. On a GPU its fused kernels read x once and keep no
dot products: the backward pass finds them again. Letters: T tokens, D width, E experts, K experts per
token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_ds.ops.extension import constant_when_compiled, extension, register_operator
from sra_ds.ops.precision import at_least_float32
from sra_ds.ops.top_k_routing import EVERYONE, Selection, TopKRouting, top_k_routing

NORM_EPS = 1e-8
GATES = ("selected", "all", "straight_through")
"""In the order of `Gate` in kernels/row_core.h."""
MAX_EXPERTS, MAX_TOP_K = 4096, 32
COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED_DEVICES = ("cuda",)
MAX_FUSED_EXPERTS = 256


def cosine_route(
    x_TD: Tensor,
    anchors_ED: Tensor,
    temperature: Tensor,
    top_k: int,
    gate: str,
    selection: Selection = EVERYONE,
    keep_scores: bool = False,
) -> tuple[TopKRouting, Tensor | None]:
    """The routing of T tokens to K of E experts and, if asked for, scores_TE.

    `temperature` has one entry or E. Ties go to the lower id, NaN is never preferred. Gradients go to x,
    anchors and temperature, from all but the scores.
    """
    if not runs_compiled(x_TD, anchors_ED, top_k):
        return cosine_route_reference(
            x_TD, anchors_ED, temperature, top_k, gate, selection, keep_scores
        )
    temperature = temperature.float().contiguous()
    valid_T, bias_E, noise_TE = (t if t is None else t.contiguous() for t in selection)
    gates_TK, ids_TK, load_E, mean_probs_E, lse_T, count_1, dots_TE, inverse_x_T, inverse_a_E = (
        torch.ops.sra_kernels.cosine_route.default(
            x_TD.contiguous(),
            anchors_ED.contiguous(),
            temperature,
            top_k,
            GATES.index(gate),
            not keep_scores and can_be_fused(x_TD, anchors_ED),
            valid_T,
            bias_E if bias_E is None else bias_E.float(),
            noise_TE if noise_TE is None else noise_TE.float(),
        )
    )
    if valid_T is not None:
        lse_T = lse_T * valid_T
    scores_TE = None
    if keep_scores:
        scale_E = inverse_a_E * temperature.detach().abs()
        scores_TE = dots_TE * inverse_x_T.unsqueeze(-1) * scale_E
    return TopKRouting(gates_TK, ids_TK, load_E, mean_probs_E, lse_T, count_1.squeeze(0)), scores_TE


def cosine_route_reference(
    x_TD: Tensor,
    anchors_ED: Tensor,
    temperature: Tensor,
    top_k: int,
    gate: str,
    selection: Selection = EVERYONE,
    keep_scores: bool = False,
) -> tuple[TopKRouting, Tensor | None]:
    """Definition of `cosine_route`."""
    scores_TE = cosine_scores(x_TD, anchors_ED, temperature)
    routing = top_k_routing(scores_TE, top_k, gate, selection)
    return routing, scores_TE.detach() if keep_scores else None


def cosine_scores(x_TD: Tensor, anchors_ED: Tensor, temperature: Tensor) -> Tensor:
    """|temperature| * cosine of every token with every anchor, in float32 at least."""
    x_TD = at_least_float32(x_TD)
    cosines_TE = F.normalize(x_TD, dim=-1, eps=NORM_EPS) @ normalized(anchors_ED, x_TD.dtype).T
    return cosines_TE * temperature.to(x_TD.dtype).abs()


def normalized(anchors_ED: Tensor, dtype: torch.dtype) -> Tensor:
    """Anchors of length 1."""
    return F.normalize(anchors_ED.to(dtype), dim=-1, eps=NORM_EPS)


def runs_compiled(x_TD: Tensor, anchors_ED: Tensor, top_k: int) -> bool:
    """Whether the compiled operator takes these inputs."""
    return (
        _available_on(x_TD.device.type)
        and x_TD.dtype in COMPILED_DTYPES
        and anchors_ED.dtype in COMPILED_DTYPES
        and len(anchors_ED) <= MAX_EXPERTS
        and top_k <= MAX_TOP_K
    )


def can_be_fused(x_TD: Tensor, anchors_ED: Tensor) -> bool:
    """Whether the fused kernels take these inputs."""
    return (
        x_TD.device.type in FUSED_DEVICES
        and x_TD.dtype == anchors_ED.dtype == torch.bfloat16
        and x_TD.shape[1] % 8 == 0
        and len(anchors_ED) <= MAX_FUSED_EXPERTS
    )


@constant_when_compiled
def _available_on(device_type: str) -> bool:
    available = device_type in extension().devices
    if available:
        _register()
    return available


def _register() -> None:
    register_operator("cosine_route", _shapes, _backward, _keep_for_backward, _gradient_shapes)


def _shapes(
    x: Tensor, anchors: Tensor, temperature: Tensor, top_k: int, gate: int, fused: bool, *_: Any
) -> tuple[Tensor, ...]:
    tokens, experts = x.shape[0], anchors.shape[0]

    def numbers(*shape: int | torch.SymInt) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    ids_TK = x.new_empty((tokens, top_k), dtype=torch.int64)
    over_experts = (numbers(experts), numbers(experts))
    dots_TE = numbers(0 if fused else tokens, experts)
    rest = (numbers(tokens), numbers(1), dots_TE, numbers(tokens), numbers(experts))
    return (numbers(tokens, top_k), ids_TK, *over_experts, *rest)


def _gradient_shapes(
    grad_gates: Tensor,
    grad_mean_probs: Tensor,
    grad_lse: Tensor,
    x: Tensor,
    anchors: Tensor,
    temperature: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(anchors), torch.empty_like(temperature)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, anchors, temperature, _, gate, fused, valid, _, _ = inputs
    _, ids, load, _, lse, *rest = output
    ctx.how = gate, fused
    ctx.save_for_backward(x, anchors, temperature, valid, ids, lse, *rest)
    ctx.mark_non_differentiable(ids, load, *rest)
    ctx.set_materialize_grads(False)  # of what is not differentiable, T x E zeros


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    x, anchors, temperature, valid, ids, lse, *kept = ctx.saved_tensors
    grad_gates, _, _, grad_mean_probs, grad_lse = upstream[:5]
    gradients = torch.ops.sra_kernels.cosine_route_backward(
        _or_zeros(grad_gates, lse, ids.shape),
        _or_zeros(grad_mean_probs, lse, anchors.shape[:1]),
        _or_zeros(grad_lse, lse, lse.shape),
        *(x, anchors, temperature, *ctx.how, valid, ids, lse, *kept),
    )
    return (*gradients, *(None for _ in range(6)))


def _or_zeros(gradient: Tensor | None, like: Tensor, shape: torch.Size) -> Tensor:
    return like.new_zeros(shape) if gradient is None else gradient.contiguous()
