"""Memories: x_BTD, context, cache -> (y_BTD, facts), added to what the channel gives; each starts as if
it were not there."""

from typing import Any

from torch import nn

from sra_ds.config.model import FastMemoryConfig, PersistentMemoryConfig, StaticMemoryConfig
from sra_ds.model.memories.fast import FastMemory, PersistentMemory
from sra_ds.model.memories.static import StaticMemory

MEMORIES: dict[type[Any], type[nn.Module]] = {
    StaticMemoryConfig: StaticMemory,
    FastMemoryConfig: FastMemory,
    PersistentMemoryConfig: PersistentMemory,
}
