"""Buffers that follow what a step found out: the bias of the selection, persistent memories."""

from collections.abc import Sequence

import torch

from sra_ds.model.language_model import LanguageModel
from sra_ds.model.memories.fast import write_memories
from sra_ds.training.controllers.protocol import Event, InBuffers, Seen


class SelectionBias(InBuffers):
    """Auxiliary-loss-free balancing (Wang et al. 2024, arXiv 2408.15664): b += u sign(mean - load)."""

    def __init__(self, model: LanguageModel, rate: float) -> None:
        self.routers, self.rate = model.routers(), rate

    def on_step_end(self, step: int, seen: Seen) -> Sequence[Event]:
        del step
        for router, routing in zip(self.routers, seen.routings, strict=True):
            error_E = routing.load_E.mean() - routing.load_E[: router.experts]
            router.selection_bias_E.add_(self.rate * torch.sign(error_E))
        return ()


class MemoryWriter(InBuffers):
    """Writes persistent memories: what documents start from moves towards where windows ended."""

    def __init__(self, model: LanguageModel) -> None:
        self.memories = model.persistent_memories()

    def on_step_end(self, step: int, seen: Seen) -> Sequence[Event]:
        del step
        write_memories(self.memories, seen.memory_states_HCC)
        return ()
