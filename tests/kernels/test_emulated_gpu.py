"""The CUDA kernels' own sources, run on a CPU: the operator's tests with every lane, barrier and matrix
instruction as PTX defines them, and every address checked by AddressSanitizer."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commands import ROOT, environment
from sra_ds.ops.kernel_build import STABLE_ABI

KERNELS = ROOT / "kernels"
EMULATOR = ROOT / "tests" / "kernels" / "emulated_gpu"
OPERATOR_TESTS = ROOT / "tests" / "ops" / "test_cosine_route.py"
QUICKLY = "not (selected or straight_through or 1000 or threads or torch.float16)"
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory.mktemp("emulated") / "emulated_gpu.so")


def compiled(library: Path, kernels: Path = KERNELS) -> Path:
    torch_home = Path(torch.__file__).parent
    sources = [*sorted(kernels.glob("cuda/*.cu")), kernels / "cuda" / "cosine_route_op.cpp"]
    replaced = [f"-include{EMULATOR / name}" for name in ("tensor_core.h", "device.h")]
    sanitizer = ["-fsanitize=address", "--param=asan-stack=0"]  # stacks are those of fibers
    flags = [
        *(
            "-std=c++17",
            "-O1",
            "-g1",
            "-fPIC",
            "-shared",
            "-Wall",
            "-Wextra",
            "-Werror",
            *sanitizer,
        ),
        *("-Wno-unknown-pragmas", "-Wno-attributes", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"),
        *(f"-I{EMULATOR}", f"-I{kernels}", f"-isystem{torch_home / 'include'}", *replaced),
    ]
    built = subprocess.run(
        ["g++", *flags, "-xc++", *sources, kernels / "schemas.cpp", EMULATOR / "emulator.cpp",
         "-o", library, f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return library


def operator_tests(library: Path, which: str) -> subprocess.CompletedProcess[str]:
    """The operator's tests on the emulated GPU, in a process of their own."""
    preloaded = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        for name in ("libasan.so", "libstdc++.so")
    ]
    variables = {
        "EMULATED_GPU": str(library),
        "PYTHONPATH": os.pathsep.join([str(EMULATOR), str(ROOT)]),
        "LD_PRELOAD": " ".join(found.stdout.strip() for found in preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-qs", "-p", "plugin", "-rs", OPERATOR_TESTS, "-k", which],
        env=environment() | variables, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@needs_gcc
def test_the_operator_keeps_its_promises_on_an_emulated_gpu(library):
    ran = operator_tests(library, QUICKLY)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    skipped = [line for line in ran.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(skipped) == 2, ran.stdout
    assert "needs a GPU" in ran.stdout and "a GPU believes the ids" in ran.stdout


@needs_gcc
@pytest.mark.slow
def test_the_operator_keeps_its_promises_at_all_sizes(library):
    ran = operator_tests(library, "")
    assert ran.returncode == 0, ran.stdout + ran.stderr


DOTS, ROW = "cuda/dot_products.h", "cuda/route_row.h"
BREAKS = {  # file, text, what takes its place, what is said
    "a barrier less": (DOTS, "      __syncthreads();\n", "", "assert"),
    "a wait less": (DOTS, "wait_for_copies<kStages - 2>();", "", "assert"),
    "past the last row": (DOTS, "t < tokens :", "true :", "heap-buffer-overflow"),
    "another lane": ("cuda/route_fused_backward.cu", "16 + lane % 16", "16 + lane % 8", "assert"),
    "gates read early": (ROW, "  __syncwarp();\n  const bool", "  const bool", "assert"),
    "ids read early": (ROW, "  __syncwarp();\n  float along_p", "  float along_p", "assert"),
    "half a warp": (ROW, "  if (live) {", "  if (lane) __syncwarp();\n  if (live) {", "instructions"),
}  # fmt: skip


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("broken", BREAKS)
def test_the_emulated_gpu_notices_errors(tmp_path, broken):
    file, text, instead, said = BREAKS[broken]
    kernels = tmp_path / "kernels"
    shutil.copytree(KERNELS, kernels)
    source = (kernels / file).read_text("utf-8")
    assert source.count(text) == 1
    (kernels / file).write_text(source.replace(text, instead), "utf-8")
    ran = operator_tests(compiled(tmp_path / "broken.so", kernels), "short_numbers and bfloat16")
    assert ran.returncode != 0
    assert re.search(said, ran.stdout + ran.stderr)
