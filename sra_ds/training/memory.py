"""Memory of one process, estimated from closed forms."""

import torch

from sra_ds.config import Recipe
from sra_ds.config.model import GeluConfig, MoEChannelConfig
from sra_ds.config.training import AdamWConfig
from sra_ds.training.ds_config import BatchPlan

ADAM_STATES = 2


def estimate_bytes(
    recipe: Recipe, parameters: int, batches: BatchPlan, stage: int, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes for parameters, gradients, optimizer, activations and logits at a ZeRO stage.

    Adam keeps two float32 numbers per parameter, and from stage 1 on there are a float32 master copy and,
    during the step, a flat float32 copy of the gradients; stage 1 shards these over processes, stage 2
    the gradients too, stage 3 the parameters too.
    """
    world, width = batches.world_size, torch.finfo(dtype).bits // 8
    states = ADAM_STATES if isinstance(recipe.training.optimizer, AdamWConfig) else 0
    master = 1 if stage > 0 else 0
    held = {
        "parameters": parameters * width // (world if stage >= 3 else 1),
        "gradients": parameters * width // (world if stage >= 2 else 1),
        "optimizer": parameters * 4 * (states + master) // (world if stage >= 1 else 1),
        "flat_gradients": parameters * 4 * master // world,
        "activations": activation_bytes(recipe, batches.micro_batch_size, width),
        "logits": recipe.model.head.chunk_tokens * recipe.data.tokenizer.vocab_size * 4 * 2,
    }
    return {**held, "total": sum(held.values())}


def activation_bytes(recipe: Recipe, micro_batch: int, width: int) -> int:
    """What backward needs of each block, per token: about 12 D for norms, attention and residuals, and
    per route 3 D + 2 F (GELU) or 3 D + 4 F (SwiGLU) for the feed-forward network; with activation
    checkpointing only the two inputs of each block's halves."""
    model = recipe.model
    tokens = micro_batch * recipe.data.sequence_length
    if recipe.training.activation_checkpointing:
        return tokens * model.layers * 4 * model.width * width
    channel = model.channel
    if isinstance(channel, MoEChannelConfig):
        feed_forward, routes = channel.expert, channel.top_k
    else:
        feed_forward, routes = channel.feed_forward, 1
    factor = 2 if isinstance(feed_forward, GeluConfig) else 4
    per_token = 12 * model.width + routes * (3 * model.width + factor * feed_forward.hidden)
    return tokens * model.layers * per_token * width
