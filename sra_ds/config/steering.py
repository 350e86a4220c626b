"""A steering: what is changed about which experts while a model runs. Saved as a small JSON card."""

from typing import Annotated, Literal

from pydantic import Field

from sra_ds.config.base import BY_KIND, Part

LARGEST = 1e6
"""No factor, boost or strength needs to be larger, and products of this size are finite."""


class Edit(Part):
    """One expert of one routed layer, both counted from 0."""

    layer: int = Field(ge=0)
    expert: int = Field(ge=0)


class Suppress(Edit):
    """Score -infinity: the expert is chosen by no token."""

    kind: Literal["suppress"] = "suppress"


class Boost(Edit):
    """Its score plus `by`, in units of scores (cosine times temperature)."""

    kind: Literal["boost"] = "boost"
    by: float = Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)


class Pin(Edit):
    """Every token takes it first, as if it were the token's best match."""

    kind: Literal["pin"] = "pin"


class Scale(Edit):
    """Its gate times `by`."""

    kind: Literal["scale"] = "scale"
    by: float = Field(ge=0, le=LARGEST, allow_inf_nan=False)
    renormalise: bool = False
    """Rescale the token's gates to the sum they had."""


class Towards(Edit):
    """Move what router and experts are given: x + strength |x| direction / |direction|."""

    kind: Literal["towards"] = "towards"
    strength: float = Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)
    """In lengths of the token's own vector; negative steers away."""
    direction: Literal["anchor"] | tuple[float, ...] = "anchor"
    """The expert's anchor, or a vector such as the mean of what it is given (its centroid)."""


class Replace(Edit):
    """Its output becomes that of another expert of the layer, a fixed vector, or zero."""

    kind: Literal["replace"] = "replace"
    output: Literal["zero"] | int | tuple[float, ...] = "zero"


AnyEdit = Annotated[
    Suppress | Boost | Pin | Scale | Towards | Replace, Field(discriminator="kind"), BY_KIND
]


class Steering(Part):
    """Edits that act together."""

    schema_version: Literal[1] = 1
    name: str = "steering"
    description: str = ""
    made_for: str = ""
    """Run and step that the numbers of the experts belong to."""
    edits: tuple[AnyEdit, ...]
