"""Where the experts of a model run: by which backend, and which of them in this process.

Expert parallelism splits the E experts of every routed layer into `size` equal, consecutive parts; the
process with expert-parallel rank r holds part r.
"""

from typing import Literal, NamedTuple

BackendName = Literal["local", "deepspeed", "megablocks"]


class Placement(NamedTuple):
    """The whole model on this process unless said otherwise."""

    backend: BackendName = "local"
    size: int = 1
    rank: int = 0

    def expert_ids(self, experts: int) -> range:
        """Global numbers of the experts this process holds."""
        held = experts // self.size
        return range(self.rank * held, (self.rank + 1) * held)


WHOLE = Placement()
