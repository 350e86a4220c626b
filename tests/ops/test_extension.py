"""Where the compiled kernels come from, and what happens without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commands import environment
from sra_ds.errors import ConfigError
from sra_ds.ops import kernel_build
from sra_ds.ops.cosine_route import runs_compiled
from sra_ds.ops.extension import extension, use_kernels

ASK = "from sra_ds.ops.extension import extension; print(extension().reason)"


def reason(**variables: str) -> str:
    """What a new process says of its kernels, in an installation without the library."""
    hide = "import sra_ds.ops.extension as e, pathlib; e.PACKAGE = pathlib.Path('/nowhere'); "
    result = subprocess.run(
        [sys.executable, "-c", hide + ASK], env=environment() | variables,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    return (result.stdout + result.stderr).strip().splitlines()[-1]


def test_without_the_library_it_is_compiled_once_into_the_cache(tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    assert reason(**cache) == "compiled, built on first use"
    library = tmp_path / "sra_ds" / "kernels" / kernel_build.library_name()
    written = library.stat().st_mtime_ns
    assert reason(**cache) == "compiled, built on this machine before"
    assert library.stat().st_mtime_ns == written


def test_without_a_compiler_the_reference_is_used_and_says_why(tmp_path):
    nowhere = {"XDG_CACHE_HOME": str(tmp_path), "CXX": "no-such-compiler"}
    assert reason(**nowhere) == "reference: no C++ compiler"
    assert reason(**nowhere, SRA_KERNELS="compiled").endswith(
        "SRA_KERNELS=compiled: no C++ compiler"
    )


def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: no space left'; exit 1\n", "utf-8")
    broken.chmod(0o755)
    found = reason(XDG_CACHE_HOME=str(tmp_path), CXX=str(broken))
    assert found == "reference: compilation failed: fatal error: no space left"


def test_the_library_has_no_python_in_it():
    if "cpu" not in extension().devices:
        pytest.skip(extension().reason)
    name = kernel_build.library_name()
    places = [kernel_build.PACKAGE / name]
    places.append(
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sra_ds/kernels" / name
    )
    library = next(path for path in places if path.exists())
    undefined = subprocess.run(
        ["nm", "-D", "-u", library], capture_output=True, text=True, check=True
    )
    assert "aoti_torch" in undefined.stdout
    assert " Py" not in undefined.stdout and "c10" not in undefined.stdout.replace("libc10", "")


def test_kernels_can_be_chosen_for_a_while():
    x_TD, anchors_ED = torch.randn(3, 4), torch.randn(2, 4)
    before = runs_compiled(x_TD, anchors_ED, 1)
    with use_kernels("reference"):
        assert not runs_compiled(x_TD, anchors_ED, 1)
        assert extension().reason.startswith("reference: ")
    assert runs_compiled(x_TD, anchors_ED, 1) == before
    with use_kernels("fastest"), pytest.raises(ConfigError, match="fastest"):
        extension()


def test_inputs_it_does_not_take_go_to_the_reference():
    wide = torch.randn(3, 4, dtype=torch.float64)
    assert not runs_compiled(wide, torch.randn(2, 4), 1)
    assert not runs_compiled(torch.randn(3, 4), torch.randn(4097, 4), 1)
    assert not runs_compiled(torch.randn(3, 4), torch.randn(40, 4), 17)
