"""Sizes and choices of an exported sra_ds language model, as `config.json` holds them."""

from typing import Any

from transformers import PreTrainedConfig


class SraConfig(PreTrainedConfig):  # type: ignore[misc]
    """A pre-LN decoder whose channel (feed-forward part) is dense or a mixture of routed experts.

    `channel` is `{"kind": "dense", "feed_forward": F}` or `{"kind": "moe", "experts": E, "top_k": K,
    "expert": F, "shared_expert": F or None, "routed_scale": "one" | "sqrt_k" | "k", "router": R}`. A
    feed-forward network F is `{"kind": "gelu", "hidden", "bias", "dropout"}` or
    `{"kind": "swiglu", "hidden", "dropout"}`. A router R is
    `{"kind": "cosine" | "linear" | "random" | "hash", "gate", "noise", "temperature", ...}`.
    """

    model_type = "sra"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 257,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        channel: dict[str, Any] | None = None,
        rope_theta: float | None = 10_000.0,
        embedding_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        max_position_embeddings: int = 256,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.channel = channel or {
            "kind": "dense",
            "feed_forward": {
                "kind": "gelu",
                "hidden": 4 * hidden_size,
                "bias": True,
                "dropout": 0.0,
            },
        }
        self.rope_theta = rope_theta
        self.embedding_dropout = embedding_dropout
        self.attention_dropout = attention_dropout
        self.max_position_embeddings = max_position_embeddings
        """Length it was trained on; nothing stops beyond it."""
        super().__init__(**{"tie_word_embeddings": True, **kwargs})
