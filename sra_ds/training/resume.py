"""Whether and from where a run can go on, decided before anything is touched."""

from pathlib import Path
from typing import NamedTuple

from sra_ds.config import Recipe
from sra_ds.config.difference import first_difference
from sra_ds.errors import ConfigError
from sra_ds.processes import from_first
from sra_ds.storage import checkpoint
from sra_ds.storage.run_dir import RunDir, read_json

MAY_CHANGE = (
    "description",
    "data.directory",
    "training.steps",
    "training.gradient_clipping",
    "training.optimizer.",
    "training.schedule.",
    "training.remedies.",
    "training.activation_checkpointing",
    "training.compile",
    "evaluation.",
    "checkpoint.",
    "logging.",
    "parallel.",
    "model.channel.backend",
)


class Resumed(NamedTuple):
    """The checkpoint a run goes on from, and why newer ones were passed over."""

    folder: Path
    step: int
    problems: list[str]


def choose_checkpoint(run: RunDir, recipe: Recipe) -> Resumed:
    """The newest complete checkpoint, its files checked by all processes together. Collective.

    Raises `CheckpointError` for a run without one and `ConfigError` for an override that would make it
    another run; the layout may be another.
    """
    require_same_run(run.recipe(), recipe)
    names = from_first(" ".join(path.name for path in checkpoint.candidates(run.checkpoints)))
    folders = [run.checkpoints / name for name in names.split()]
    folder, problems = checkpoint.first_complete(folders, checkpoint.verify_together)
    return Resumed(folder, read_json(folder / checkpoint.TRAINER)["step"], problems)


def require_same_run(before: Recipe, now: Recipe) -> None:
    """Raise `ConfigError` for the first key that may not change on resume."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    documents = now.training.batching == "documents"  # which fill the micro-batch
    free = MAY_CHANGE if documents else (*MAY_CHANGE, "training.micro_batch_size")
    found = first_difference(old, new, free)
    if found is not None:
        raise ConfigError(
            f"{found.path}={found.other} differs from the run's {found.one}; a resumed run keeps "
            "it: start a new run from its weights with --init-from"
        )
