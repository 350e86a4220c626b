"""Bytes a forward pass keeps for its backward pass, and what the head needs, from closed forms.

Counted tensor by tensor from what autograd saves (`tests/planning/test_activations.py` counts them again).
Letters: N tokens of a micro-batch, T tokens of a window, D width, F hidden width, H heads, E experts (e of
them held here), K experts per token, V vocabulary, L layers; w bytes of a number in the model's precision.
Routers compute in float32 whatever w is. Routing is assumed to be balanced.
"""

from typing import NamedTuple

from sra_ds.config import Recipe
from sra_ds.config.model import (
    CosineRouterConfig,
    FeedForwardConfig,
    GeluConfig,
    LinearRouterConfig,
    MoEChannelConfig,
    RandomRouterConfig,
)

FLOAT, INTEGER = 4, 8
ROWS_OF_AN_EXPERT = 8
"""Rows the deepspeed backend pads each expert's to."""


class Setting(NamedTuple):
    """What besides the recipe decides: windows of a micro-batch, bytes of a number, expert-parallel size,
    whether the deepspeed backend runs the experts, and the device ("cpu" has no fused attention with
    dropout and keeps dropout masks as numbers)."""

    windows: int
    width: int = 4
    ep: int = 1
    marked: bool = False
    device: str = "cuda"


class Activations(NamedTuple):
    """`kept`: by all layers until their backward pass; `layer`: by one layer alone, which with activation
    checkpointing exists only while the layer is recomputed; `logits`: the head's chunks and the gradient
    of its table."""

    kept: int
    layer: int
    logits: int


def activation_bytes(recipe: Recipe, setting: Setting) -> Activations:
    """Bytes of one micro-batch on one process."""
    model, w = recipe.model, setting.width
    tokens = setting.windows * recipe.data.sequence_length
    mixer, channel = _mixer(recipe, setting), _channel(recipe, setting)
    layer = tokens * (mixer.inside + mixer.outside + channel.inside + channel.outside)
    layer += channel.fixed
    kept = layer * model.layers
    if recipe.training.activation_checkpointing:
        outside = mixer.outside + channel.outside + 2 * model.width * w
        kept = tokens * outside * model.layers
    mask = w if setting.device == "cpu" else 1
    ends = 3 * model.width * w + (model.width * mask if model.embedding.dropout else 0)
    return Activations(kept + tokens * ends, layer, _logits(recipe, tokens, w))


class _Part(NamedTuple):
    """Bytes per token that checkpointing drops (inside) and does not (outside); `fixed`: per layer."""

    inside: float
    outside: float
    fixed: int = 0


def _mixer(recipe: Recipe, setting: Setting) -> _Part:
    """Fused attention keeps its input (D), q and k after rotation and before it with v (5 D), its output
    twice (2 D) and the mask of documents as w numbers; unfused, three H x T matrices of weights."""
    model, w = recipe.model, setting.width
    width, heads, length = model.width, model.mixer.heads, recipe.data.sequence_length
    if setting.device == "cpu" and model.mixer.dropout > 0:
        return _Part((5 * width + 3 * heads * length) * w, width * w)
    mask = length if model.document_boundaries else 0
    return _Part((8 * width + mask) * w + heads * FLOAT, width * w)


def _channel(recipe: Recipe, setting: Setting) -> _Part:
    """The norm's input (D), the router's, and per route its row, the hidden layer and its result."""
    model, w = recipe.model, setting.width
    width, channel = model.width, model.channel
    if not isinstance(channel, MoEChannelConfig):
        hidden = _hidden(channel.feed_forward, setting)
        return _Part(width * w + hidden, width * w)
    router = 0
    if isinstance(channel.router, CosineRouterConfig | RandomRouterConfig):
        router = (2 * width + 3 * channel.experts) * FLOAT
    elif isinstance(channel.router, LinearRouterConfig):
        router = (width + 2 * channel.experts) * FLOAT
    hidden = _hidden(channel.expert, setting)
    routes = channel.top_k * (2 * width * w + hidden + 5 * INTEGER)
    shared = 0.0
    if channel.shared_expert is not None:
        shared = width * w + _hidden(channel.shared_expert, setting)
    fixed = 0
    if setting.marked:
        padding = channel.experts // setting.ep * ROWS_OF_AN_EXPERT
        fixed = int(padding * (width * w + hidden + 2 * INTEGER))
    return _Part(routes + shared, width * w + router, fixed)


def _hidden(config: FeedForwardConfig, setting: Setting) -> float:
    """2 F for GELU (before and after it), 4 F for SwiGLU (gate before and after SiLU, up, their product),
    and the mask of a dropout."""
    count = 2 if isinstance(config, GeluConfig) else 4
    mask = setting.width if setting.device == "cpu" else 1
    return config.hidden * (count * setting.width + (mask if config.dropout else 0))


def _logits(recipe: Recipe, tokens: int, w: int) -> int:
    """A chunk's logits and their exponentials, with several chunks also the chunk's before, in float32;
    and the gradient of the table in float32."""
    chunk = recipe.model.head.chunk_tokens
    chunks = 3 if tokens > chunk else 2
    vocabulary = recipe.data.tokenizer.vocab_size
    table = vocabulary * recipe.model.width * (FLOAT + (w if w < FLOAT else 0))
    return min(tokens, chunk) * vocabulary * FLOAT * chunks + table
