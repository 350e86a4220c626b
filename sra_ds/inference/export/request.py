"""What the command line of `tools/export_experts.py` asks for: checked, then carried out."""

from pathlib import Path
from typing import Any, NamedTuple

from sra_ds.errors import ConfigError
from sra_ds.inference.export.experts import choose_places, export_experts
from sra_ds.inference.export.prune import prune
from sra_ds.inference.export.runs import merge, transplant
from sra_ds.inference.load import LoadedRun
from sra_ds.inference.places import parse_place


class Request(NamedTuple):
    """At most one of `merge`, `transplant` and `prune` is given, and what belongs to it."""

    layer: int | None = None
    experts: str | None = None
    merge: Path | None = None
    transplant: Path | None = None
    place: str | None = None
    """Of `transplant`, as LAYER:EXPERT."""
    prune: str | None = None
    measure_tokens: int | None = None

    @property
    def changes_the_model(self) -> bool:
        """Whether a run comes out, and not exported experts."""
        return any(way is not None for way in (self.merge, self.transplant, self.prune))

    def require_sense(self) -> None:
        """Raise `ConfigError` for an option without effect or one that is missing."""
        exports = {"--layer": self.layer, "--experts": self.experts}
        changes = {"--as": self.place, "--measure-tokens": self.measure_tokens}
        if self.changes_the_model:
            _refuse(exports, "without --merge, --transplant and --prune")
        else:
            _refuse(changes, "with --merge, --transplant or --prune")
        if self.transplant is None:
            _refuse({"--as": self.place}, "with --transplant")
        elif self.place is None:
            raise ConfigError("--transplant needs --as LAYER:EXPERT, the place it goes to")
        else:
            parse_place(self.place, "--as")


def carry_out(loaded: LoadedRun, request: Request, out: Path) -> dict[str, Any]:
    """Write what was asked for; returns what was written. Raises `SraError`."""
    if request.merge is not None:
        return merge(loaded, request.merge, out)
    if request.transplant is not None and request.place is not None:
        return transplant(loaded, request.transplant, parse_place(request.place, "--as"), out)
    if request.prune is not None:
        return prune(loaded, request.prune, out)
    places = choose_places(loaded.recipe, request.layer, request.experts)
    return export_experts(loaded, places, out)


def _refuse(given: dict[str, Any], only: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name} has an effect only {only}; leave it out")
