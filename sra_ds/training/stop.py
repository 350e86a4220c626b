"""Being asked to stop: SIGTERM, SIGUSR1 (slurm) and Ctrl-C finish the step, save and leave.

The DeepSpeed launcher re-sends SIGTERM and kills after 30 s, and a terminal sends Ctrl-C to every
process of the group: the handler only notes the first signal and ignores the others.
"""

import signal
from types import FrameType

from sra_ds.processes import any_of

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Use as a context manager around training; `agreed` is collective."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self) -> bool:
        """Whether any process was asked to stop; the same answer on all of them."""
        return any_of(self.signal is not None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is None:
            self.signal = signal.Signals(number).name
