"""The gate for native DeepSpeed MoE layers against the local backend."""

import pytest
import torch
from torch import Tensor, nn

from distributed import run_ranks
from references import leaves, randomise, unstack
from sra_ds.config.model import CosineRouterConfig, GeluConfig, MoEChannelConfig
from sra_ds.errors import ConfigError

WIDTH, EXPERTS, HIDDEN = 8, 4, 16
GELU = GeluConfig(hidden=HIDDEN, dropout=0.0)


def local_layer(top_k: int) -> nn.Module:
    from sra_ds.moe.layer import MoELayer

    torch.manual_seed(3)
    config = MoEChannelConfig(experts=EXPERTS, top_k=top_k, expert=GELU)
    return randomise(MoELayer(config, WIDTH), 0.5).eval()


def native_layer(local: nn.Module, top_k: int, ep_size: int = 1, rank: int = 0) -> nn.Module:
    """A native layer with the local layer's router and this rank's experts."""
    from deepspeed.moe.layer import MoE

    from sra_ds.moe.deepspeed_gate import use_sra_gate

    networks = unstack(local.backend.experts, GELU, WIDTH)
    layer = MoE(WIDTH, networks[0], EXPERTS, ep_size=ep_size, k=top_k, drop_tokens=False)
    layer.set_deepspeed_parallelism()
    gate = use_sra_gate(layer, CosineRouterConfig())
    if ep_size > 1:
        gate._set_ep_group(layer.deepspeed_moe.ep_group)
    gate.router.load_state_dict(local.router.state_dict())
    held = EXPERTS // ep_size
    for number, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        expert.load_state_dict(networks[rank * held + number].state_dict())
    return layer.eval()


def compare(rank: int, world: int, top_k: int) -> dict[str, float]:
    """Largest differences of one rank's tokens: output, input gradient, anchors' gradient."""
    local = local_layer(top_k)
    native = native_layer(local, top_k, world, rank)
    tokens_TD = torch.randn(63 * world, WIDTH, generator=torch.Generator().manual_seed(0))
    part = slice(63 * rank, 63 * (rank + 1))
    x_TD, y_TD = leaves(*[tokens_TD[part].clone()] * 2)
    ours_TD, facts = local(x_TD)
    routing = facts["routing"]
    theirs_TD, balance, load_E = native(y_TD)
    weights_TD = torch.randn(63, WIDTH, generator=torch.Generator().manual_seed(1))
    (ours_TD * weights_TD).sum().backward()
    (theirs_TD * weights_TD).sum().backward()
    share_E = routing.load_E / routing.load_E.sum()
    expected = EXPERTS * (share_E * routing.mean_probs_E).sum()
    anchors = native.deepspeed_moe.gate.router.anchors.grad
    return {
        "output": worst(ours_TD, theirs_TD),
        "input": worst(x_TD.grad, y_TD.grad),
        "anchors": worst(local.router.anchors.grad, anchors),
        "balance": float((balance - expected).abs()),
        "load": float((load_E - routing.load_E).abs().max()),
    }


def worst(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def body(top_k: int) -> dict[str, float]:
    import torch.distributed as dist

    from sra_ds.training.processes import start_processes

    start_processes()
    return compare(dist.get_rank(), dist.get_world_size(), top_k)


@pytest.mark.parametrize(("world", "top_k"), [(1, 1), (1, 2), (2, 2)])
def test_a_native_layer_equals_the_local_backend(world: int, top_k: int) -> None:
    for found in run_ranks(world, body, top_k):
        assert max(found.values()) < 1e-5, found


def dropping() -> str:
    from deepspeed.moe.layer import MoE

    from sra_ds.moe.deepspeed_gate import use_sra_gate
    from sra_ds.training.processes import start_processes

    start_processes()
    layer = MoE(WIDTH, nn.Linear(WIDTH, WIDTH), EXPERTS, k=2, drop_tokens=True)
    with pytest.raises(ConfigError, match="drop_tokens=False"):
        use_sra_gate(layer, CosineRouterConfig())
    layer = MoE(WIDTH, nn.Linear(WIDTH, WIDTH), EXPERTS, k=2, drop_tokens=False)
    gate = use_sra_gate(layer, CosineRouterConfig())
    with pytest.raises(ConfigError, match="sparse"):
        gate(torch.randn(3, WIDTH), sparse_routes=False)
    used_T = torch.tensor([1, 0, 1])
    *_, gates_KT, load_E = gate(torch.randn(3, WIDTH), used_T)
    return f"{gates_KT[:, 1].abs().sum():.0f} {int(load_E.sum())}"


def test_what_it_cannot_do_is_refused_and_padding_counts_nowhere() -> None:
    assert run_ranks(1, dropping) == ["0 4"]
