"""Tensors in safetensors files, whole or in parts, so that who wrote them does not matter to who reads.

A fragment is a flat range of a whole tensor. Each process writes those it holds; a reader asks for any
range of a name and gets it from whichever files have it. Expert parallelism splits stacked experts along
their first dimension and ZeRO splits flattened tensors, so both leave flat ranges.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sra_ds.errors import CheckpointError

HEADER = "fragments"


class Range(NamedTuple):
    """Elements `start` to `stop` of a flattened tensor of `shape`."""

    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.stop - self.start == math.prod(self.shape)

    @property
    def parts(self) -> int:
        """How many ranges of this size make the tensor."""
        return math.prod(self.shape) // (self.stop - self.start)


class Fragment(NamedTuple):
    """The values of a range, flat."""

    range: Range
    values: Tensor


def whole_tensor(tensor: Tensor) -> Fragment:
    """A tensor as its own only fragment."""
    return Fragment(Range(tuple(tensor.shape), 0, tensor.numel()), tensor.detach().reshape(-1))


def write_fragments(path: Path, fragments: Mapping[str, Fragment]) -> None:
    """One safetensors file; whole tensors have their own shape in it, parts are flat."""
    tensors, parts = {}, {}
    for name, (part, values) in fragments.items():
        shape = part.shape if part.whole else (len(values),)
        tensors[name] = values.detach().cpu().reshape(shape).contiguous()
        if not part.whole:
            parts[name] = {"shape": part.shape, "start": part.start}
    save_file(tensors, path, {"format": "pt", HEADER: json.dumps(parts)})
    path.chmod(0o644)  # readable by others, as every other file of a run


def _range_of(given: Any, size: int) -> Range | None:
    """The range of `size` elements that a header tells; None if it is impossible."""
    match given:
        case {"shape": [*shape], "start": int(start)}:
            natural = all(isinstance(length, int) and length >= 0 for length in shape)
            if natural and 0 <= start <= math.prod(shape) - size:
                return Range(tuple(shape), start, start + size)
    return None


class TensorFiles:
    """Safetensors files that together hold whole tensors; a `CheckpointError` if they do not."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = sorted(paths)
        self._parts: dict[str, list[tuple[Range, int]]] = {}
        try:
            self._files = [safe_open(path, framework="pt") for path in self.paths]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.paths[0].parent}: {error}") from None
        for number, file in enumerate(self._files):
            parts = self._header(number)
            for name in file.keys():  # noqa: SIM118 - not a mapping
                held = tuple(file.get_slice(name).get_shape())
                part = _range_of(parts.get(name, {"shape": held, "start": 0}), math.prod(held))
                others = self._parts.setdefault(name, [])
                if part is None or (others and others[0][0].shape != part.shape):
                    raise CheckpointError(
                        f"{self.paths[number]} is damaged (what it holds of {name} fits no tensor)"
                    )
                others.append((part, number))

    def _header(self, number: int) -> dict[str, Any]:
        """Shape and start of the parts among a file's tensors."""
        try:
            parts = json.loads((self._files[number].metadata() or {}).get(HEADER, "{}"))
        except ValueError:
            parts = None
        if not isinstance(parts, dict):
            raise CheckpointError(f"{self.paths[number]} is damaged (its header tells no parts)")
        return parts

    @property
    def names(self) -> list[str]:
        """Every tensor, sorted."""
        return sorted(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._parts[name][0][0].shape

    def read_into(self, name: str, start: int, values: Tensor) -> None:
        """Fill a flat tensor with the elements from `start` on."""
        at, stop = start, start + values.numel()
        for part, number in sorted(self._parts.get(name, [])):
            end = min(stop, part.stop)
            if part.start <= at < end:
                stored = self._files[number].get_tensor(name).reshape(-1)
                values[at - start : end - start].copy_(stored[at - part.start : end - part.start])
                at = end
        if at < stop:
            raise CheckpointError(
                f"{self.paths[0].parent}: elements {start} to {stop} of {name} are not all there"
            )

    def whole_fragment(self, name: str) -> Fragment:
        """A whole tensor as one fragment."""
        return whole_tensor(self.read(name))

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        part, number = self._parts[name][0]
        if part.whole:
            tensor: Tensor = self._files[number].get_tensor(name)
            return tensor
        values = self._files[number].get_tensor(name).new_empty(math.prod(part.shape))
        self.read_into(name, 0, values)
        whole: Tensor = values.view(part.shape)
        return whole
