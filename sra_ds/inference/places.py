"""Experts named by layer and number, as people write them: `2:7` is expert 7 of layer 2."""

from collections.abc import Sequence
from typing import NamedTuple

from sra_ds.config import Recipe
from sra_ds.config.model import MoEChannelConfig
from sra_ds.errors import ConfigError


class Place(NamedTuple):
    """One expert of a model."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"{self.layer}:{self.expert}"


def routed(recipe: Recipe) -> MoEChannelConfig:
    """The channel of a model with experts; raises `ConfigError` for a dense one."""
    channel = recipe.model.channel
    if not isinstance(channel, MoEChannelConfig):
        raise ConfigError(f"{recipe.name} is a dense model; it has no experts")
    return channel


def experts_of(recipe: Recipe) -> list[int]:
    """How many experts each layer has from the start; raises `ConfigError` for a dense model."""
    return [routed(recipe).experts] * recipe.model.layers


def require_place(experts_L: Sequence[int], place: Place, where: str) -> None:
    """Raise `ConfigError` for an expert beyond those of its layer; `where` opens the message."""
    layers = len(experts_L)
    if place.layer >= layers:
        raise ConfigError(f"{where}: there is no layer {place.layer} (0 to {layers - 1})")
    experts = experts_L[place.layer]
    if place.expert >= experts:
        raise ConfigError(f"{where}: there is no expert {place.expert} (0 to {experts - 1})")


def parse_place(text: str, option: str) -> Place:
    """`2:7` as layer 2, expert 7; raises `ConfigError`."""
    layer, separator, expert = text.partition(":")
    if not separator:
        raise ConfigError(f"{option} {text}: expected LAYER:EXPERT, such as 2:7")
    return Place(parse_number(layer, f"{option} {text}"), parse_number(expert, f"{option} {text}"))


def parse_number(text: str, where: str) -> int:
    """A number of a layer or expert; raises `ConfigError`."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"{where}: {text!r} is not the number of a layer or expert")
    return int(text)
