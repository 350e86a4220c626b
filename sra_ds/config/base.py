"""The base of every recipe part: frozen, closed to unknown keys, one line of documentation per field.

A choice between parts is a pydantic union discriminated by `kind` (for data: by `source`). In YAML and
on the command line a bare name stands for the part with its defaults: `mixer: attention` is
`mixer: {kind: attention}`.
"""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Part(BaseModel):
    """A frozen node of the recipe tree; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _named(key: str) -> BeforeValidator:
    def expand(value: Any) -> Any:
        return {key: value} if isinstance(value, str) else value

    return BeforeValidator(expand)


BY_KIND = _named("kind")
BY_SOURCE = _named("source")
