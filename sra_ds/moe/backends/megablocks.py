"""MegaBlocks' dropless layer (dMoE) with our router for its router and our experts for its experts.

    routing -> sort routes -> gather rows -> experts -> scatter with gates

Sorting, gather and scatter are MegaBlocks' own, in Triton. Its expert networks have neither biases nor
dropout, so ours are handed to it; its balance loss is off. Below float32 it rounds each gated row before
the sum over k, and the gates' gradients, where `local` keeps float32. Written for MegaBlocks 0.10.0;
`tests/moe/test_megablocks.py` says what it relies on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sra_ds.config.model import MoEChannelConfig
from sra_ds.errors import BackendUnavailable
from sra_ds.moe.backends.stand_ins import provide_missing
from sra_ds.moe.experts import GroupedExperts, build_experts
from sra_ds.moe.placement import Placement
from sra_ds.moe.routing import Routing

OURS = "sra_ds"
"""Name of our experts in MegaBlocks' table of networks while a layer is built."""
BLOCK = 128
"""Rows per block of MegaBlocks; the hidden width of networks it makes without memory and we replace."""


class DecidedRouter(nn.Module):
    """Stands where MegaBlocks has its router: (scores_TE, weights_TK, ids_TK) of a decided routing."""

    routing: Routing | None = None

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What MegaBlocks calls. Only its balance loss reads the scores, so they are zeros."""
        assert self.routing is not None
        scores_TE = x_TD.new_zeros(()).expand(len(x_TD), len(self.routing.load_E))
        gates_TK, ids_TK = self.routing.gates_TK, self.routing.expert_ids_TK
        return scores_TE, gates_TK.contiguous(), ids_TK


class MegaBlocksBackend(nn.Module):
    """x_TD, routing -> out_TD, like `LocalBackend`."""

    def __init__(self, config: MoEChannelConfig, width: int, placement: Placement) -> None:
        super().__init__()
        if placement.size > 1:
            raise BackendUnavailable(
                "model.channel.backend=megablocks keeps all experts in every process, but "
                f"parallel.expert_parallel_size={placement.size}: use model.channel.backend=deepspeed"
            )
        library = load_library()
        self.placement = placement
        self.experts = build_experts(config.expert, placement.expert_ids(config.experts), width)
        self._interpreted = library.interpreted
        # in a tuple, so that the experts are parameters of this module once, under their own name
        self._layer = (_build_layer(library, self.experts, width),)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Run the routed experts; every route is computed, padding included."""
        self._check(x_TD, routing.expert_ids_TK.shape[1])
        (layer,) = self._layer
        layer.experts.args.moe_top_k = routing.expert_ids_TK.shape[1]
        layer.router.routing = routing
        try:
            with torch.autocast(x_TD.device.type, enabled=False):
                out_TD: Tensor = layer(x_TD.contiguous())
        finally:
            layer.router.routing = None
        return out_TD

    def _check(self, x_TD: Tensor, top_k: int) -> None:
        require_device(x_TD.device, self._interpreted)
        if x_TD.dtype == torch.float64:
            raise BackendUnavailable(
                "model.channel.backend=megablocks computes in float32 at most, but its input is "
                "float64: use model.channel.backend=local"
            )
        if x_TD.numel() * top_k >= 2**31:
            raise BackendUnavailable(
                f"model.channel.backend=megablocks addresses rows in 32 bits, but {len(x_TD)} tokens x "
                f"{top_k} experts x width {x_TD.shape[1]} is more: lower training.micro_batch_size"
            )


class Library(NamedTuple):
    """What is used of MegaBlocks."""

    arguments: Any
    """The dataclass that configures a layer."""
    layer: Any
    """The dropless layer."""
    networks: dict[str, dict[str, Any]]
    """Its table of expert networks: type -> implementation -> what builds one."""
    interpreted: bool
    """Whether its kernels are for the CPU."""


def load_library() -> Library:
    """Import MegaBlocks, with stand-ins for what it needs compiled."""
    try:
        provide_missing()
        from megablocks.backend import kernels
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmlp_registry import _REGISTRY
        from megablocks.layers.dmoe import dMoE
        from triton import language
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError as error:
        raise BackendUnavailable(
            f"model.channel.backend=megablocks cannot be loaded ({error}): run `make megablocks`"
        ) from error
    tuned = [kernel for kernel in vars(kernels).values() if isinstance(kernel, Autotuner)]
    functions = [language.sum, *(kernel.fn for kernel in tuned)]
    interpreted = all(isinstance(function, InterpretedFunction) for function in functions)
    if interpreted:  # nothing can be timed there, so one choice is left
        for kernel in tuned:
            del kernel.configs[:-1]
    return Library(Arguments, dMoE, _REGISTRY, interpreted)


def require_device(device: torch.device, interpreted: bool) -> None:
    """Raise `BackendUnavailable` where the kernels cannot run."""
    if device.type == "cpu" and not interpreted:
        raise BackendUnavailable(
            "model.channel.backend=megablocks runs on the CPU only in Triton's interpreter, a slow one "
            "for tests: set TRITON_INTERPRET=1 before the start, or model.channel.backend=local"
        )


def _build_layer(library: Library, experts: GroupedExperts, width: int) -> Any:
    """A dMoE around our experts that has no parameter of its own."""
    arguments = library.arguments(
        hidden_size=width,
        ffn_hidden_size=BLOCK,
        moe_num_experts=len(experts.expert_ids),
        moe_loss_weight=0,
        mlp_type=OURS,
        mlp_impl="grouped",
        bias=False,
        return_bias=False,
        fp16=False,
        device="meta",
    )
    with _offered(experts, library.networks):
        layer = library.layer(arguments)
    layer.router = DecidedRouter()
    return layer


@contextmanager
def _offered(experts: GroupedExperts, networks: dict[str, dict[str, Any]]) -> Iterator[None]:
    """`experts` is what MegaBlocks builds meanwhile."""
    networks[OURS] = {"grouped": lambda arguments: experts}
    try:
        yield
    finally:
        del networks[OURS]
