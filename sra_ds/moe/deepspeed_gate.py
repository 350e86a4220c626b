"""Cosine routing for models that already have DeepSpeed's native `deepspeed.moe.layer.MoE` layers.

    layer = MoE(width, expert, num_experts=8, k=2, drop_tokens=False)
    use_sra_gate(layer, CosineRouterConfig())

Its experts' buffers are padded to the fullest expert, it is refused at ZeRO-3, and its checkpoints are
DeepSpeed's; `model.channel.backend=deepspeed` has none of these limits.
"""

import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn

from sra_ds.config.model import CosineRouterConfig
from sra_ds.errors import ConfigError
from sra_ds.moe.routers import CosineRouter
from sra_ds.moe.routing import Routing

GateOutput = tuple[Tensor, Tensor, int, Tensor, Tensor, Tensor, Tensor]


class SRAGate(TopKGate):  # type: ignore[misc]
    """DeepSpeed's gate contract with a cosine router behind it.

    Returns (auxiliary loss, slots per expert, E, expert ids KT, slots KT, gates KT, load E) for T tokens;
    the loss is E * sum_e load share * mean probability (Fedus et al. 2021), without a weight.
    """

    def __init__(self, config: CosineRouterConfig, width: int, experts: int, top_k: int) -> None:
        super().__init__(width, experts, k=top_k, drop_tokens=False)
        del self.wg
        self.router = CosineRouter(config, width, experts, top_k)
        nn.init.orthogonal_(self.router.anchors)
        self.routing: Routing | None = None

    def forward(
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = True,
        use_tutel: bool = False,
    ) -> GateOutput:
        """Route `input` T x D; `used_token` T is 0 where a token is padding: it gets a gate of 0."""
        if not sparse_routes or use_tutel:
            raise ConfigError("SRAGate gives sparse routes, without Tutel")
        valid_T = None if used_token is None else used_token.bool()
        routing = self.routing = self.router(input, valid_T)
        ids_TK, experts = routing.expert_ids_TK, len(routing.load_E)
        chosen_TE = torch.zeros(len(input), experts, dtype=torch.int32, device=input.device)
        chosen_TE.scatter_(1, ids_TK, 1)
        slots_TK = (chosen_TE.cumsum(0) - 1).gather(1, ids_TK)
        fullest = chosen_TE.sum(0).max().long()
        if self.ep_group is not None and dist.get_world_size(group=self.ep_group) > 1:
            dist.all_reduce(fullest, op=dist.ReduceOp.MAX, group=self.ep_group)
        gates_TK = routing.gates_TK
        if valid_T is not None:
            gates_TK = gates_TK * valid_T.unsqueeze(-1)
        share_E = routing.load_E / routing.load_E.sum().clamp(min=1)
        balance = experts * (share_E * routing.mean_probs_E).sum()
        return (
            balance, fullest, experts, ids_TK.T.contiguous().int(), slots_TK.T.contiguous().int(),
            gates_TK.T.contiguous(), routing.load_E.long(),
        )  # fmt: skip


def use_sra_gate(layer: MoE, config: CosineRouterConfig) -> SRAGate:
    """Give a native layer a cosine router instead of its linear one; returns the new gate. Raises
    `ConfigError` for a layer that drops tokens: then a token's output would depend on other tokens."""
    old = layer.deepspeed_moe.gate
    if old.drop_tokens:
        raise ConfigError("SRAGate needs a MoE layer with drop_tokens=False")
    experts, width = old.wg.weight.shape
    gate = SRAGate(config, width, experts, old.k)
    gate.to(old.wg.weight.device)
    layer.deepspeed_moe.gate = gate
    return gate
