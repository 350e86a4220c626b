"""The base of every recipe part: frozen, closed to unknown keys, one line of documentation per field.

A choice between parts is a pydantic union discriminated by `kind` (for data: by `source`). In YAML and
on the command line a bare name stands for the part with its defaults: `mixer: attention` is
`mixer: {kind: attention}`. Where one kind is the usual one, it may be left out.
"""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Part(BaseModel):
    """A frozen node of the recipe tree; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def by_name(key: str, usual: str | None = None) -> BeforeValidator:
    """Expand a bare name to `{key: name}`, and fill in the usual choice where none is named."""

    def expand(value: Any) -> Any:
        if isinstance(value, str):
            return {key: value}
        if usual is not None and isinstance(value, dict) and key not in value:
            return {key: usual, **value}
        return value

    return BeforeValidator(expand)


BY_KIND = by_name("kind")
