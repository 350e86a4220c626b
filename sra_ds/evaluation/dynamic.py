"""Dynamic evaluation: a persistent memory goes on being written while a text is scored.

Windows are scored one after the other, and after each the memory moves towards the state it ended in,
so every prediction depends on earlier text alone. It is another task than scoring with the memory as
training left it, and is told apart from it. The memory is put back afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sra_ds.data.shards import TokenSplit
from sra_ds.errors import ConfigError
from sra_ds.evaluation.perplexity import Model, Perplexity, Setting, evaluate
from sra_ds.model.language_model import LanguageModel, ModelOutput
from sra_ds.model.memories.fast import write_memories


def evaluate_dynamically(
    model: LanguageModel, split: TokenSplit, setting: Setting, progress: bool = False
) -> Perplexity:
    """`evaluate` in the order of the text, writing after each window. Raises `ConfigError` for a model
    without persistent memory."""
    require_persistent_memory(model)
    with writing(model) as written:
        found = evaluate(written, split, setting._replace(batch_size=1), progress=progress)
    assert found is not None
    return found


def require_persistent_memory(model: LanguageModel) -> None:
    """Raise `ConfigError` for a model without one."""
    if not model.persistent_memories():
        raise ConfigError(
            "--dynamic needs a model with memory.kind=persistent: only that is written"
        )


@contextmanager
def writing(model: LanguageModel) -> Iterator[Model]:
    """The model, writing its memories after each call until the end of the block."""
    memories = model.persistent_memories()
    before = [memory.start_state_HCC.clone() for memory in memories]

    def scored_then_written(*batch: Any) -> ModelOutput:
        output: ModelOutput = model(*batch)
        write_memories(memories, output.memory_states_HCC)
        return output

    try:
        yield scored_then_written
    finally:
        with torch.no_grad():
            for memory, state_HCC in zip(memories, before, strict=True):
                memory.start_state_HCC.copy_(state_HCC)
