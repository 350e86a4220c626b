"""Bytes a forward pass keeps for its backward pass, and what the head needs, from closed forms.

Counted tensor by tensor from what autograd saves (`tests/planning/test_activations.py` counts them
again). Letters: N tokens of a micro-batch, T tokens of a window, D width, F hidden width, H heads, E
experts (e of them held here), K experts per token, V vocabulary, L layers; w bytes of a number in the
model's precision. Routers compute in float32 whatever w is. Routing is assumed to be balanced.
"""

import math
from typing import NamedTuple

from sra_ds.config.model import (
    AttentionConfig,
    CosineRouterConfig,
    FactorisedEmbeddingConfig,
    FastWeightsConfig,
    FeedForwardConfig,
    GeluConfig,
    HarmonicsConfig,
    HybridEmbeddingConfig,
    LinearRouterConfig,
    MoEChannelConfig,
    PersistentMemoryConfig,
    PreManifestHeadConfig,
    PrimeHilbertEmbeddingConfig,
    PrimeMaskedChannelConfig,
    RandomRouterConfig,
    ResonanceConfig,
    StaticMemoryConfig,
)
from sra_ds.planning.case import Case
from sra_ds.planning.filtered import filtered_numbers
from sra_ds.planning.opened import opened_bytes

FLOAT, INTEGER = 4, 8
DELTA_CHUNK = 32
"""Positions that `ops.delta_rule` takes at once."""
ROWS_OF_AN_EXPERT = 8
"""Rows the deepspeed backend pads each expert's to."""


class Activations(NamedTuple):
    """`kept`: by all layers until their backward pass; `layer`: by one layer alone, which with activation
    checkpointing exists only while the layer is recomputed; `logits`: the head's chunks and the gradient
    of its table."""

    kept: int
    layer: int
    logits: int


def activation_bytes(case: Case) -> Activations:
    """Bytes of one micro-batch on one process."""
    model, w, tokens = case.recipe.model, case.width, case.tokens
    parts = (_mixer(case), _channel(case), _memory(case))
    layer = tokens * sum(part.inside + part.outside for part in parts)
    layer += sum(part.fixed for part in parts)
    kept = layer * model.layers
    if case.recipe.training.activation_checkpointing:
        kept = tokens * sum(part.outside + part.input for part in parts) * model.layers
    ends: float = 3 * model.width * w + (
        model.width * _mask(case) if model.embedding.dropout else 0
    )
    ends += (_embedding(case) + _head(case)) * w
    return Activations(round(kept + tokens * ends), round(layer), _logits(case))


def _mask(case: Case) -> int:
    """Bytes dropout keeps per number."""
    return case.width if case.device == "cpu" else 1


class _Part(NamedTuple):
    """Bytes per token that checkpointing drops (inside), does not (outside) and adds (input); `fixed`:
    per layer."""

    inside: float
    outside: float
    input: float
    fixed: int = 0


def _mixer(case: Case) -> _Part:
    """Fused attention keeps its input (D), q and k after rotation and before it with v (5 D), its output
    twice (2 D) and the mask of documents as w numbers; unfused, three H x T matrices of weights."""
    model, w = case.recipe.model, case.width
    width, length = model.width, case.recipe.data.sequence_length
    if not isinstance(model.mixer, AttentionConfig | ResonanceConfig):
        return _Part(filtered_numbers(model.mixer, width, length) * w, width * w, width * w)
    heads = model.mixer.heads
    if isinstance(model.mixer, ResonanceConfig) and model.mixer.iterations > 1:
        inside, fixed = _iterations(model.mixer, width, length), case.tokens * length
        return _Part(inside * w, width * w, width * w, fixed // model.layers)
    dropout = isinstance(model.mixer, AttentionConfig) and model.mixer.dropout > 0
    if case.device == "cpu" and dropout:
        return _Part((5 * width + 3 * heads * length) * w, width * w, width * w)
    mask = length if model.document_boundaries else 0
    return _Part((8 * width + mask) * w + heads * FLOAT, width * w, width * w)


def _iterations(mixer: ResonanceConfig, width: int, length: int) -> float:
    """Numbers per token. Per iteration the query before and after sharpening, what it found, what that
    retrieves and its weighted part (5 D), the retrieval map copied for every sequence, entropies and
    their like; halting hard gathers queries and what they found (2 D)."""
    copied = width * width / mixer.heads / length
    each = 5 * width + copied + 5 * mixer.heads
    gathered = 2 * width * (mixer.iterations - 1) if mixer.halting == "hard" else 0
    return mixer.iterations * each + gathered - 0.3 * width


def _memory(case: Case) -> _Part:
    """Slots: cosines with all of them, keys, and what the best are and weigh. Fast weights: of every
    channel the projections, their unit vectors, what is read and written, and the rows of a chunk for
    each head."""
    memory, w = case.recipe.model.memory, case.width
    if isinstance(memory, StaticMemoryConfig):
        cosines = (1 if case.compiled else 3) * memory.slots
        numbers = 2 * memory.key_width + 4 * memory.best
        return _Part(cosines * FLOAT + numbers * w, 0, case.recipe.model.width * w)
    if isinstance(memory, FastWeightsConfig):
        inner = memory.heads * memory.head_width
        persistent = 4 * inner if isinstance(memory, PersistentMemoryConfig) else 0
        numbers = 12 * inner + 8 * memory.heads * DELTA_CHUNK + persistent
        return _Part(numbers * FLOAT, 0, case.recipe.model.width * w)
    return _Part(0, 0, 0)


def _embedding(case: Case) -> float:
    """Numbers per token besides the vectors: subspaces before and after codes and norms; of a hybrid the
    coefficients, both vectors and what the head is given; of polar coefficients what they come from."""
    embedding = case.recipe.model.embedding
    if isinstance(embedding, PrimeHilbertEmbeddingConfig):
        return 5 * embedding.copies * sum(embedding.primes)
    if not isinstance(embedding, HarmonicsConfig):
        return 0
    polar = 7 * embedding.harmonics if embedding.coefficients == "polar" else 0
    if isinstance(embedding, HybridEmbeddingConfig):
        return 2 * case.recipe.model.width + 4 * embedding.harmonics + polar
    return polar


def _head(case: Case) -> float:
    """Numbers per token and step of refinement: states (7 U) and candidates."""
    head = case.recipe.model.head
    if not isinstance(head, PreManifestHeadConfig):
        return 0
    return head.steps * (7 * _table_width(case) + 6 * head.candidates)


def _table_width(case: Case) -> int:
    model = case.recipe.model
    embedding = model.embedding
    if isinstance(embedding, PrimeHilbertEmbeddingConfig):
        return embedding.table_width
    if isinstance(embedding, FactorisedEmbeddingConfig):
        return embedding.rank
    if isinstance(embedding, HarmonicsConfig):
        tokens = model.width if isinstance(embedding, HybridEmbeddingConfig) else 0
        return tokens + 2 * embedding.harmonics
    return model.width


def _channel(case: Case) -> _Part:
    """The norm's input (D), the router's, and per route its row, the hidden layer and its result."""
    model, w = case.recipe.model, case.width
    width, channel = model.width, model.channel
    if not isinstance(channel, MoEChannelConfig):
        hidden = _hidden(channel.feed_forward, case)
        fixed = 0
        if isinstance(channel, PrimeMaskedChannelConfig):
            fixed = _sparse_copies(channel, width, w)
            compiled = case.compiled and case.device == "cpu" and w == FLOAT
            if channel.storage == "blocks" and not compiled:
                # inputs are kept channels first, beside a memory's
                hidden += 2 * max(channel.primes) * w
                hidden += width * w if isinstance(model.memory, StaticMemoryConfig) else 0
        return _Part(width * w + hidden, width * w, width * w, fixed)
    router = 0
    own_input = width * w if w < FLOAT else 0  # in float32 the router keeps the same tensor
    if isinstance(channel.router, CosineRouterConfig | RandomRouterConfig):
        router = (2 * width + 3 * channel.experts) * FLOAT
        if case.compiled:  # its input as it is, and the dot products
            router, own_input = width * w + channel.experts * FLOAT, 0
    elif isinstance(channel.router, LinearRouterConfig):
        router = (width + 2 * channel.experts) * FLOAT
    hidden = _hidden(channel.expert, case, experts=True)
    routes = channel.top_k * (2 * width * w + hidden + 5 * INTEGER)
    shared = 0.0
    if channel.shared_expert is not None:
        shared = width * w + _hidden(channel.shared_expert, case)
    fixed = 0
    if case.layout.marked:
        padding = channel.experts // case.layout.ep * ROWS_OF_AN_EXPERT
        fixed = int(padding * (width * w + hidden + 2 * INTEGER))
    visible = case.recipe.data.sequence_length if model.document_boundaries else 0
    opened = opened_bytes(channel, width, w, _hidden(channel.expert, case), visible)
    return _Part(routes + shared + opened, width * w + router, own_input, fixed)


def _sparse_copies(channel: PrimeMaskedChannelConfig, width: int, w: int) -> int:
    """Matrices under their masks; or blocks, and where live values go in them."""
    matrices = 2 if isinstance(channel.feed_forward, GeluConfig) else 3
    entries = matrices * width * channel.feed_forward.hidden
    if channel.storage == "masked":
        return entries * (w + 1)
    live = 1 - math.prod(1 - 1 / prime for prime in channel.primes)
    blocks = sum(1 / prime for prime in channel.primes)
    return round(entries * (live * INTEGER + blocks * w))


def _hidden(config: FeedForwardConfig, case: Case, experts: bool = False) -> float:
    """2 F for GELU (before and after it), 4 F for SwiGLU (gate before and after SiLU, up, their product),
    and the mask of a dropout."""
    count = 2 if isinstance(config, GeluConfig) else 4
    if experts and case.compiled and case.device == "cpu" and not config.dropout:
        count //= 2  # only before the activation
    return config.hidden * (count * case.width + (_mask(case) if config.dropout else 0))


def _logits(case: Case) -> int:
    """A chunk's logits, which become their gradient, in float32 and in the model's numbers, if other; and
    the gradient of the table in float32, with what is added to it."""
    model, w = case.recipe.model, case.width
    vocabulary = case.recipe.data.tokenizer.vocab_size
    chunk = min(case.tokens, model.head.chunk_tokens) * vocabulary
    table = vocabulary * _table_width(case)
    narrow = w if w < FLOAT else 0
    most = max(chunk * (FLOAT + narrow), chunk * w + table * w)
    if isinstance(model.embedding, HarmonicsConfig) and model.embedding.coefficients == "polar":
        most += table * w  # made anew
    return most + table * FLOAT
