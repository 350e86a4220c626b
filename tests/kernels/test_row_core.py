"""The core of a row, which CPU and GPU kernels share, compiled and run by itself."""

import shutil
import subprocess

import pytest

from commands import ROOT

KERNELS = ROOT / "kernels"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_order_gates_and_gradients_equal_plain_double_arithmetic(tmp_path):
    program = tmp_path / "row_core"
    sources = [ROOT / "tests" / "kernels" / "row_core.cpp", KERNELS / "cpu" / "cosine_route.cpp"]
    flags = ["-std=c++17", "-O2", "-fopenmp-simd", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas", f"-I{KERNELS}"]
    compiled = subprocess.run(
        ["g++", *flags, *sources, "-o", program], capture_output=True, text=True, check=False
    )
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert (ran.returncode, ran.stdout.strip()) == (0, "all correct")
