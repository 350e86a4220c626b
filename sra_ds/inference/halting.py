"""Another way to halt than a resonance model was trained with."""

from collections.abc import Iterator
from contextlib import contextmanager

from sra_ds.errors import ConfigError
from sra_ds.model.language_model import LanguageModel
from sra_ds.model.mixers.resonance import Resonance


@contextmanager
def halted_by(model: LanguageModel, how: str | None) -> Iterator[None]:
    """Let every layer that iterates halt as `how` says until the end of the block: `soft`, `hard`, or
    either with another threshold as in `hard:0.5`; None leaves all as it is. Raises `ConfigError`."""
    mixers = [m for m in model.modules() if isinstance(m, Resonance) and m.iterations > 1]
    before = [(mixer.halting, mixer.threshold) for mixer in mixers]
    if how is not None:
        kind, threshold = read_halting(how)
        if not mixers:
            raise ConfigError(
                f"--halting {how}: the model's mixer does not iterate (resonance does)"
            )
        for mixer in mixers:
            mixer.halting = kind
            mixer.threshold = mixer.threshold if threshold is None else threshold
    try:
        yield
    finally:
        for mixer, own in zip(mixers, before, strict=True):
            mixer.halting, mixer.threshold = own


def read_halting(how: str) -> tuple[str, float | None]:
    """`hard:0.5` -> ("hard", 0.5)."""
    kind, separator, text = how.partition(":")
    try:
        threshold = float(text) if separator else None
    except ValueError:
        threshold = -1.0
    if kind not in ("soft", "hard") or (threshold is not None and not 0 <= threshold <= 1):
        raise ConfigError(
            f"--halting {how}: expected soft or hard, or with a threshold of the relative entropy "
            "from 0 to 1 as in hard:0.5"
        )
    return kind, threshold
