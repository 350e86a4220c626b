"""The CUDA sources compile, link and load where there is no GPU, and their kernels keep to registers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from commands import ROOT, environment
from sra_ds.ops.kernel_build import cuda_home

needs_toolkit = pytest.mark.skipif(cuda_home() is None, reason="needs a CUDA toolkit")

MOST_SECONDS = 300
BEYOND = "Lanes<32, 128, 4>"
"""Rows of 2,049 to 4,096 experts, the only ones that may need more registers than there are."""
LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(has(f"sra_kernels::cosine_route{way}", "CUDA") for way in ("", "_backward")))
"""


def build(out: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "build_kernels.py", *options, "--out", out, "--json"],
        env=environment() | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip


def check(out: Path, archs: str) -> None:
    ran = build(out, "--archs", archs)
    assert ran.returncode == 0, ran.stderr
    built = json.loads(ran.stdout)
    assert built["seconds"] < MOST_SECONDS
    kernels = {(kernel["kernel"], kernel["arch"]): kernel for kernel in built["kernels"]}
    every = archs.split(";")
    common = [f"route_fused{way}<{tile}>" for tile in (64, 128, 256)
              for way in (": forward", "_backward: backward")]  # fmt: skip
    assert all((name, arch) in kernels for name in common for arch in every)
    assert len(kernels) == len(built["kernels"]) >= 35 * len(every)
    spilled = [key for key, kernel in kernels.items() if kernel["spilled"] and BEYOND not in key[0]]
    assert not spilled
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, built["library"]], capture_output=True, text=True, check=False
    )
    assert loaded.stdout.strip() == "True True", loaded.stderr


@needs_toolkit
def test_they_compile_for_two_generations_without_spilling(tmp_path):
    check(tmp_path, "86;90")


@needs_toolkit
@pytest.mark.slow
def test_they_compile_for_every_generation_without_spilling(tmp_path):
    check(tmp_path, "80;86;89;90;100")


@pytest.mark.parametrize(
    ("options", "variables", "said"),
    [
        (["--archs", "75"], {}, "error: CUDA architecture 75: expected numbers from 80 on, as 80;90+PTX"),
        ([], {"SRA_CUDA": "yes"}, "error: SRA_CUDA=yes: expected 0, 1 or auto"),
        ([], {"CXX": "no-such-compiler"}, "error: no C++ compiler"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_in_one_line(tmp_path, options, variables, said):
    ran = build(tmp_path, *options, **variables)
    assert (ran.returncode, ran.stdout, ran.stderr.strip()) == (2, "", said)
