"""The compiled extension: found beside the package, or compiled once into the user's cache, or absent.

SRA_KERNELS says what to do: `auto` (use it if it can be had), `compiled` (fail without it), `reference`
(never use it); `use_kernels` overrides it for a while. Whatever is chosen comes with its reason.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import torch

from sra_ds.errors import BackendUnavailable, ConfigError
from sra_ds.files import user_cache
from sra_ds.ops.kernel_build import (
    PACKAGE,
    BuildError,
    archs_of,
    build_what_is_wanted,
    library_name,
    serves,
    wanted,
)

Answer = TypeVar("Answer", bound=Callable[..., bool])
CHOICES = ("auto", "compiled", "reference")
KERNELS = "kernels"
"""Folder of the user's cache where libraries are built when the package has none that serves."""


class Extension(NamedTuple):
    """Device types the compiled operators run on, and why those."""

    devices: frozenset[str]
    reason: str


_override: ContextVar[str | None] = ContextVar("kernels", default=None)
_registered: set[str] = set()
_registering = Lock()


@contextmanager
def use_kernels(choice: str) -> Iterator[None]:
    """Do as if SRA_KERNELS were `choice`."""
    token = _override.set(choice)
    try:
        yield
    finally:
        _override.reset(token)


def extension() -> Extension:
    """What is used now; raises `BackendUnavailable` if the library is required and cannot be had."""
    return _load(_override.get() or os.environ.get("SRA_KERNELS", "auto"))


def constant_when_compiled(function: Answer) -> Answer:
    """What `torch.compiler.assume_constant_result` does, which would first import the compiler: half of
    the time that every command takes to start."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def register_operator(
    name: str,
    shapes: Callable[..., Any],
    backward: Callable[..., Any],
    keep_for_backward: Callable[..., Any],
    gradient_shapes: Callable[..., Any] | None = None,
) -> None:
    """What torch needs to trace and differentiate `name`, and `name`_backward if there is one, after
    loading; the first call counts, whichever thread makes it."""
    with _registering:
        if name in _registered:
            return
        torch.library.register_fake(f"sra_kernels::{name}", shapes)
        if gradient_shapes is not None:
            torch.library.register_fake(f"sra_kernels::{name}_backward", gradient_shapes)
        torch.library.register_autograd(
            f"sra_kernels::{name}", backward, setup_context=keep_for_backward
        )
        _registered.add(name)


@functools.cache
def _load(asked: str) -> Extension:
    if asked not in CHOICES:
        raise ConfigError(f"SRA_KERNELS={asked}: expected {', '.join(CHOICES)}")
    if asked == "reference":
        return Extension(frozenset(), "reference: SRA_KERNELS=reference")
    capabilities = gpu_capabilities()
    try:
        path, how = _library(capabilities)
        torch.ops.load_library(str(path))
    except (BuildError, OSError) as error:
        if asked == "compiled":
            raise BackendUnavailable(f"SRA_KERNELS=compiled: {error}") from None
        return Extension(frozenset(), f"reference: {error}")
    if capabilities and _serves_all(path, capabilities):
        return Extension(frozenset({"cpu", "cuda"}), f"compiled for this GPU too, {how}")
    return Extension(frozenset({"cpu"}), f"compiled, {how}")


def gpu_capabilities() -> frozenset[tuple[int, int]]:
    """Of the GPUs of this process."""
    if not torch.cuda.is_available():
        return frozenset()
    return frozenset(
        torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())
    )


def _library(capabilities: frozenset[tuple[int, int]]) -> tuple[Path, str]:
    """A library of the present sources, and where it comes from: the package, the user's cache, or a
    compiler. One that does not serve the GPUs is the last choice."""
    for path, how in _libraries():
        if _serves_all(path, capabilities):
            return path, how
    for_cpus = next(_libraries(), None)
    try:
        why = _why_not_for_gpus()
        if for_cpus is None or not why:
            path, why = build_what_is_wanted(user_cache(KERNELS))
            for_cpus = path, "built on first use"
    except BuildError as error:
        if for_cpus is None:
            raise
        why = str(error)
    path, how = for_cpus
    if _serves_all(path, capabilities):
        return path, how
    return path, f"{how}; not for this GPU: {why or 'SRA_CUDA_ARCHS names others'}"


def _why_not_for_gpus() -> str:
    try:
        return wanted().reason
    except BuildError as error:
        return str(error)


def _libraries() -> Iterator[tuple[Path, str]]:
    """Those of the present sources that are there, for CPUs alone first."""
    stem = Path(library_name()).stem
    places = (
        (PACKAGE, "installed with the package"),
        (user_cache(KERNELS), "built on this machine before"),
    )
    for folder, how in places:
        for path in sorted(folder.glob(f"{stem}*.so"), key=lambda path: len(path.name)):
            yield path, how


def _serves_all(library: Path, capabilities: frozenset[tuple[int, int]]) -> bool:
    return all(serves(archs_of(library), capability) for capability in capabilities)
