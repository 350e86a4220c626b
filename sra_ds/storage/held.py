"""Which part of every whole tensor a model on this process holds."""

import math

from sra_ds.model.language_model import LanguageModel
from sra_ds.moe.layer import MoELayer
from sra_ds.storage.fragments import Range


def held_ranges(model: LanguageModel) -> dict[str, Range]:
    """The range of each tensor of the state dict: all of it, but for experts spread over processes. Under
    ZeRO-3 the range of the gathered tensor."""
    ranges = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        ranges[name] = Range(shape, 0, math.prod(shape))
    for layer_name, layer in model.named_modules():
        if isinstance(layer, MoELayer):
            held = layer.backend.experts
            for name, _ in held.named_parameters():
                path = f"{layer_name}.backend.experts.{name}"
                shape = (layer.config.experts, *ranges[path].shape[1:])
                size, ids = math.prod(shape[1:]), held.expert_ids
                ranges[path] = Range(shape, ids.start * size, ids.stop * size)
    return ranges
