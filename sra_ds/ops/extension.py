"""The compiled extension: found beside the package, or compiled once into the user's cache, or absent.

SRA_KERNELS says what to do: `auto` (use it if it can be had), `compiled` (fail without it), `reference`
(never use it); `use_kernels` overrides it for a while. Whatever is chosen comes with its reason.
"""

import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sra_ds.errors import BackendUnavailable, ConfigError
from sra_ds.ops.kernel_build import PACKAGE, BuildError, build, library_name

CHOICES = ("auto", "compiled", "reference")


class Extension(NamedTuple):
    """Device types the compiled operators run on, and why those."""

    devices: frozenset[str]
    reason: str


_override: ContextVar[str | None] = ContextVar("kernels", default=None)


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


def register_operator(
    name: str,
    shapes: Callable[..., Any],
    gradient_shapes: Callable[..., Any],
    backward: Callable[..., Any],
    keep_for_backward: Callable[..., Any],
) -> None:
    """What torch needs to trace and differentiate `name` by `name`_backward; once, after loading."""
    torch.library.register_fake(f"sra_kernels::{name}", shapes)
    torch.library.register_fake(f"sra_kernels::{name}_backward", gradient_shapes)
    torch.library.register_autograd(
        f"sra_kernels::{name}", backward, setup_context=keep_for_backward
    )


@functools.cache
def _load(asked: str) -> Extension:
    if asked not in CHOICES:
        raise ConfigError(f"SRA_KERNELS={asked}: expected {', '.join(CHOICES)}")
    if asked == "reference":
        return Extension(frozenset(), "reference: SRA_KERNELS=reference")
    try:
        path, how = _library()
        torch.ops.load_library(str(path))
    except (BuildError, OSError) as error:
        if asked == "compiled":
            raise BackendUnavailable(f"SRA_KERNELS=compiled: {error}") from None
        return Extension(frozenset(), f"reference: {error}")
    return Extension(frozenset({"cpu"}), f"compiled, {how}")


def _library() -> tuple[Path, str]:
    """The library of the present sources, and where it comes from."""
    installed = PACKAGE / library_name()
    if installed.exists():
        return installed, "installed with the package"
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "sra_ds" / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, others wait for it
        path = folder / library_name()
        if path.exists():
            return path, "built on this machine before"
        return build(folder), "built on first use"
