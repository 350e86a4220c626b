"""A language model of sra_ds for transformers: embedding -> blocks[attention, channel] -> norm -> head.

The channel of a block is one feed-forward network, or experts a router chooses among for each token:

    scores s_te = tau * cos(x_t, anchor_e)    (or W x_t; a hash of the token id has none)
    the k largest  ->  gates  ->  y_t = scale * sum over k of gate * expert(x_t)

`output_router_logits=True` returns the scores of every layer, N x E. Scores, softmax, gates and the sum
over experts are in float32 at least. A row of the batch is one document, opened by the end-of-text token,
as the tokenizer beside this file writes it. The auxiliary losses of training are not here.

Letters: B sequences, T new positions, S >= T positions visible to them, D width, H heads, C channels of a
head, V vocabulary, E experts, K experts per token, N = B*T tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .configuration_sra import SraConfig

NORM_EPS = 1e-8
GATE_EPS = 1e-6
Settings = dict[str, Any]


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 become float32; float32 and float64 pass."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class FeedForward(nn.Module):
    """down(gelu(up(x))), or down(silu(gate(x)) * up(x)); x[..., D] -> [..., D]."""

    def __init__(self, settings: Settings, width: int) -> None:
        super().__init__()
        gated, bias = settings["kind"] == "swiglu", bool(settings.get("bias"))
        self.gate = nn.Linear(width, settings["hidden"], bias=False) if gated else None
        self.up = nn.Linear(width, settings["hidden"], bias=bias)
        self.down = nn.Linear(settings["hidden"], width, bias=bias)
        self.dropout = settings["dropout"]

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        hidden = F.gelu(up, approximate="tanh") if self.gate is None else F.silu(self.gate(x)) * up
        out: Tensor = self.down(F.dropout(hidden, self.dropout, self.training))
        return out


class Experts(nn.Module):
    """E feed-forward networks, stacked: one expert per row of the first dimension."""

    def __init__(self, settings: Settings, width: int, experts: int) -> None:
        super().__init__()
        hidden = settings["hidden"]
        gated, bias = settings["kind"] == "swiglu", bool(settings.get("bias"))
        self.gate_weight = nn.Parameter(torch.empty(experts, width, hidden)) if gated else None
        self.up_weight = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_bias = nn.Parameter(torch.empty(experts, hidden)) if bias else None
        self.down_weight = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_bias = nn.Parameter(torch.empty(experts, width)) if bias else None
        self.dropout = settings["dropout"]

    def forward(self, x_ND: Tensor, gates_NK: Tensor, ids_NK: Tensor) -> Tensor:
        """Every token through its K experts: y_ND."""
        rows_NKD = x_ND.new_empty(*ids_NK.shape, x_ND.shape[1])
        for expert in ids_NK.unique().tolist():
            chosen_NK = ids_NK == expert
            rows_NKD[chosen_NK] = self.expert(expert, x_ND[chosen_NK.nonzero()[:, 0]])
        out_ND = (at_least_float32(rows_NKD) * gates_NK.unsqueeze(-1)).sum(1)
        return out_ND.to(x_ND.dtype)

    def expert(self, e: int, x: Tensor) -> Tensor:
        """One expert's network."""
        up = x @ self.up_weight[e] + (0 if self.up_bias is None else self.up_bias[e])
        if self.gate_weight is None:
            hidden = F.gelu(up, approximate="tanh")
        else:
            hidden = F.silu(x @ self.gate_weight[e]) * up
        hidden = F.dropout(hidden, self.dropout, self.training)
        return hidden @ self.down_weight[e] + (0 if self.down_bias is None else self.down_bias[e])


class ScoringRouter(nn.Module):
    """What routers with scores share: the choice, with a bias on it, and the gates."""

    selection_bias_E: Tensor

    def __init__(self, settings: Settings, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        del width
        self.gate, self.noise, self.top_k = settings["gate"], settings["noise"], top_k
        self.register_buffer("selection_bias_E", torch.zeros(experts))

    def scores(self, x_ND: Tensor) -> Tensor:
        """scores_NE of tokens in float32 at least."""
        raise NotImplementedError

    def forward(self, x_ND: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(gates_NK, expert ids_NK, scores_NE); equal scores go to the lower id."""
        del ids_N
        scores_NE = self.scores(at_least_float32(x_ND))
        competing_NE = scores_NE.detach() + self.selection_bias_E
        if self.training and self.noise:
            competing_NE = competing_NE + self.noise * torch.randn_like(competing_NE)
        order_NE = competing_NE.sort(dim=-1, descending=True, stable=True).indices
        chosen_NK = order_NE[:, : self.top_k]
        return self.gates(scores_NE, chosen_NK), chosen_NK, scores_NE

    def gates(self, scores_NE: Tensor, chosen_NK: Tensor) -> Tensor:
        """Weights of the chosen: softmax over them (`selected`), over all experts and renormalised
        (`all`; the bare probability for k = 1), or 1 for k = 1 (`straight_through`, else `selected`)."""
        if self.gate == "selected" or (self.gate == "straight_through" and self.top_k > 1):
            return scores_NE.gather(-1, chosen_NK).softmax(-1)
        probs_NK = scores_NE.softmax(-1).gather(-1, chosen_NK)
        if self.gate == "straight_through":
            return 1.0 + (
                probs_NK - probs_NK.detach()
            )  # exactly 1, with the gradient of the probability
        return (
            probs_NK if self.top_k == 1 else probs_NK / (probs_NK.sum(-1, keepdim=True) + GATE_EPS)
        )


class AnchorRouter(ScoringRouter):
    """tau * cos(x, anchor_e); anchors are learned (cosine) or frozen (random)."""

    anchors: Tensor
    temperature: Tensor

    def __init__(self, settings: Settings, width: int, experts: int, top_k: int) -> None:
        super().__init__(settings, width, experts, top_k)
        form, learned = settings["temperature"], settings["kind"] == "cosine"
        tau = torch.ones(experts if form == "per_expert" else 1)
        for name, values, trained in (
            ("anchors", torch.empty(experts, width), learned),
            ("temperature", tau, form in ("global", "per_expert")),
        ):
            if trained:
                self.register_parameter(name, nn.Parameter(values))
            else:
                self.register_buffer(name, values)

    def scores(self, x_ND: Tensor) -> Tensor:
        anchors_ED = self.anchors.to(x_ND.dtype)
        unit_ND, unit_ED = (F.normalize(v, dim=-1, eps=NORM_EPS) for v in (x_ND, anchors_ED))
        return unit_ND @ unit_ED.T * self.temperature.to(x_ND.dtype).abs()


class LinearRouter(ScoringRouter):
    """W x (+ b)."""

    def __init__(self, settings: Settings, width: int, experts: int, top_k: int) -> None:
        super().__init__(settings, width, experts, top_k)
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.bias = nn.Parameter(torch.empty(experts)) if settings["bias"] else None

    def scores(self, x_ND: Tensor) -> Tensor:
        bias_E = None if self.bias is None else self.bias.to(x_ND.dtype)
        return F.linear(x_ND, self.weight.to(x_ND.dtype), bias_E)


class HashRouter(nn.Module):
    """K experts by a fixed hash of (token id, expert); gates are 1/K."""

    def __init__(self, settings: Settings, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        del settings, width
        self.experts, self.top_k = experts, top_k

    def forward(self, x_ND: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(gates_NK, expert ids_NK, zeros for scores); the token's vector is not looked at."""
        every_E = torch.arange(self.experts, device=ids_N.device)
        hashed_NE = mixed(ids_N.unsqueeze(-1) * self.experts + every_E)
        chosen_NK = hashed_NE.sort(stable=True).indices[:, : self.top_k]
        zeros_NE = at_least_float32(x_ND).new_zeros(hashed_NE.shape)
        return zeros_NE.new_full(chosen_NK.shape, 1 / self.top_k), chosen_NK, zeros_NE


def mixed(x: Tensor) -> Tensor:
    """A bijective 31-bit integer mix (xorshift-multiply), without overflow in int64."""
    mask = 0x7FFFFFFF
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & mask
    x = (x ^ (x >> 12)) * 0x297A2D39 & mask
    return x ^ (x >> 15)


ROUTERS: dict[str, type[nn.Module]] = {
    "cosine": AnchorRouter,
    "random": AnchorRouter,
    "linear": LinearRouter,
    "hash": HashRouter,
}


class MixtureOfExperts(nn.Module):
    """Routed experts, and a shared one that every token passes besides."""

    def __init__(self, settings: Settings, width: int) -> None:
        super().__init__()
        router, experts, shared = settings["router"], settings["experts"], settings["shared_expert"]
        self.router = ROUTERS[router["kind"]](router, width, experts, settings["top_k"])
        self.experts = Experts(settings["expert"], width, experts)
        self.shared_expert = None if shared is None else FeedForward(shared, width)
        top_k, scale = settings["top_k"], settings.get("routed_scale", "one")
        self.routed_scale = {"one": 1.0, "sqrt_k": top_k**0.5, "k": float(top_k)}[scale]

    def forward(self, x_BTD: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(y_BTD, scores_NE)."""
        gates_NK, chosen_NK, scores_NE = self.router(x_BTD.flatten(0, 1), ids_BT.flatten())
        scaled_NK = gates_NK * self.routed_scale
        y_BTD = self.experts(x_BTD.flatten(0, 1), scaled_NK, chosen_NK).view_as(x_BTD)
        if self.shared_expert is not None:
            y_BTD = y_BTD + self.shared_expert(x_BTD)
        return y_BTD, scores_NE


class Attention(nn.Module):
    """Causal attention with rotary positions (RoFormer, arXiv 2104.09864)."""

    def __init__(self, config: SraConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.num_attention_heads
        self.theta, self.dropout = config.rope_theta, config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x_BTD: Tensor, positions_BT: Tensor, visible: Tensor | None, cache: Any
    ) -> Tensor:
        """`visible` is a mask B x 1 x T x S; None means causal and nothing else."""
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if self.theta is not None:
            q, k = rotate(q, positions_BT, self.theta), rotate(k, positions_BT, self.theta)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        dropout = self.dropout if self.training else 0.0
        y_BHTC = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=visible is None
        )
        out: Tensor = self.out(y_BHTC.transpose(1, 2).reshape(B, T, D))
        return out


def rotate(x_BHTC: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    """Rotate channel pairs (i, i + C/2) by position * theta^(-2i/C); the angles are in float64."""
    channels = x_BHTC.shape[-1]
    steps = torch.arange(0, channels, 2, dtype=torch.float64, device=x_BHTC.device)
    angles_B1TC = (positions_BT.double()[..., None] * theta ** (-steps / channels)).unsqueeze(1)
    cos, sin = angles_B1TC.cos().to(x_BHTC.dtype), angles_B1TC.sin().to(x_BHTC.dtype)
    first, second = x_BHTC.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + channel(norm(x))."""

    def __init__(self, config: SraConfig, layer: int) -> None:
        super().__init__()
        width, channel = config.hidden_size, config.channel
        dense = channel["kind"] == "dense"
        self.mixer_norm = nn.LayerNorm(width)
        self.mixer = Attention(config, layer)
        self.channel_norm = nn.LayerNorm(width)
        self.channel = (
            FeedForward(channel["feed_forward"], width)
            if dense
            else MixtureOfExperts(channel, width)
        )

    def forward(
        self,
        x_BTD: Tensor,
        ids_BT: Tensor,
        positions_BT: Tensor,
        visible: Tensor | None,
        cache: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(x_BTD, scores_NE of the router or None)."""
        x_BTD = x_BTD + self.mixer(self.mixer_norm(x_BTD), positions_BT, visible, cache)
        h_BTD, scores_NE = self.channel_norm(x_BTD), None
        if isinstance(self.channel, MixtureOfExperts):
            y_BTD, scores_NE = self.channel(h_BTD, ids_BT)
        else:
            y_BTD = self.channel(h_BTD)
        return x_BTD + y_BTD, scores_NE


class SraForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Next-token logits; the head is the embedding's table."""

    config_class = SraConfig
    _no_split_modules = ("Block",)
    _keep_in_fp32_modules_strict = ("router",)
    _supports_sdpa = True

    def __init__(self, config: SraConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool = False,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits B x T x V, of the last `logits_to_keep` positions if that is not 0.

        `attention_mask` B x S is 0 at padding. With `past_key_values` the ids continue what it holds.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = positions(input_ids, attention_mask, past)
        visible = visible_positions(input_ids, attention_mask, past)
        x_BTD = F.dropout(self.embedding(input_ids), self.config.embedding_dropout, self.training)
        scores: list[Tensor] = []
        for block in self.blocks:
            x_BTD, scores_NE = block(x_BTD, input_ids, position_ids, visible, past_key_values)
            if scores_NE is not None:
                scores.append(scores_NE)
        h_BTD = self.final_norm(x_BTD[:, -logits_to_keep:])
        logits = at_least_float32(F.linear(h_BTD, self.embedding.weight))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            router_logits=tuple(scores) if output_router_logits else None,
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def _init_weights(self, module: nn.Module) -> None:
        """Values for a model that is built and not loaded; torch's functions, which transformers makes
        pass over loaded tensors."""
        super()._init_weights(module)
        if isinstance(module, (Experts, ScoringRouter)):
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if "bias" in name:
                    nn.init.zeros_(tensor)
                elif name == "temperature":
                    nn.init.constant_(tensor, 10.0)
                else:
                    nn.init.normal_(tensor, std=0.02)


def positions(ids_BT: Tensor, mask_BS: Tensor | None, past: int) -> Tensor:
    """positions_BT: how many tokens that are not padding stand before each."""
    length = ids_BT.shape[1]
    if mask_BS is None:
        return torch.arange(past, past + length, device=ids_BT.device)[None]
    return (mask_BS.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def visible_positions(ids_BT: Tensor, mask_BS: Tensor | None, past: int) -> Tensor | None:
    """Boolean B x 1 x T x S: position s may be seen from t. Causal and not padding; a position always
    sees itself, so that padding has something to attend to."""
    if mask_BS is None and past == 0:
        return None
    if mask_BS is not None and mask_BS.dim() == 4:
        return mask_BS
    total = past + ids_BT.shape[1]
    columns_S = torch.arange(total, device=ids_BT.device)
    rows_T1 = columns_S[past:, None]
    visible = (columns_S <= rows_T1)[None, None]
    if mask_BS is not None:
        visible = visible & mask_BS.bool()[:, None, None, :] | (columns_S == rows_T1)
    return visible
