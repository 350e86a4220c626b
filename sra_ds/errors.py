"""Errors a user can act on: one line each, saying what, where and what to do.

Commands print the message and leave with `exit_code`; everything else is a bug and keeps its traceback.
"""


class SraError(Exception):
    """Base of every error that is the input's or the machine's, not the code's."""

    exit_code = 2


class ConfigError(SraError):
    """A recipe, an override or a DeepSpeed JSON says something that cannot be run."""


class DataError(SraError):
    """A corpus, tokenizer or token shard is missing, damaged or does not belong to this run."""


class CheckpointError(SraError):
    """A run directory or checkpoint is missing, incomplete or of another layout."""


class BackendUnavailable(SraError):
    """A library, compiler or device that was asked for is not usable here."""


class TrainingError(SraError):
    """Training cannot go on: a non-finite loss, no memory left, no disk left."""

    exit_code = 1
