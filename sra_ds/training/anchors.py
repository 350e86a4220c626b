"""Anchors seeded from data: each layer's anchors become normalised router inputs of the first batch.

Done once, before the first step, from the same batch on every rank; a forward pass never does it, so
loading a checkpoint elsewhere cannot seed again.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sra_ds.data.loader import Batch
from sra_ds.errors import ConfigError
from sra_ds.model.init import generator
from sra_ds.model.language_model import LanguageModel
from sra_ds.training.engine import write_parameter


@torch.no_grad()
def seed_anchors(model: LanguageModel, forward: nn.Module, batch: Batch, seed: int) -> None:
    """Replace the anchors of every cosine router, layer by layer, since a layer's input depends on the
    anchors before it. `forward` is the model or the engine around it. Collective."""
    training = forward.training
    forward.eval()
    for number, router in enumerate(model.routers()):
        inputs: list[Tensor] = []
        handle = router.register_forward_pre_hook(_keep(inputs))
        forward(*batch)
        handle.remove()
        valid = slice(None) if batch.valid_BT is None else batch.valid_BT.flatten()
        tokens_ND = inputs[0][valid]
        if len(tokens_ND) < router.experts:
            raise ConfigError(
                f"anchors=data needs at least experts={router.experts} tokens in the first batch, "
                f"it has {len(tokens_ND)}; raise training.batch_size"
            )
        chosen = torch.randperm(len(tokens_ND), generator=generator(seed, "anchors", number))
        seeds_ED = tokens_ND[chosen[: router.experts].to(tokens_ND.device)]
        write_parameter(router.anchors, normalize(seeds_ED.float(), dim=-1))
    forward.train(training)


def _keep(inputs: list[Tensor]) -> Any:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        del module
        inputs.append(arguments[0])

    return hook
