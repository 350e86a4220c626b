"""Where the compiled kernels come from, and what happens without them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commands import ROOT, environment
from sra_ds.errors import ConfigError
from sra_ds.ops import extension as extension_module
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


@pytest.fixture
def broken(tmp_path):
    """A compiler that fails, and counts how often it is asked to compile."""
    compiler = tmp_path / "broken"
    compiler.write_text(
        f"""#!/bin/sh
        case "$*" in *-c*) echo asked >> {tmp_path / "times"} ;; esac
        echo 'fatal error: no space left'; exit 1""",
        "utf-8",
    )
    compiler.chmod(0o755)
    return compiler


def times(compiler: Path) -> int:
    return len((compiler.parent / "times").read_text("utf-8").splitlines())


def test_a_compiler_that_fails_is_quoted_and_not_asked_again(tmp_path, broken):
    variables = {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(broken)}
    said = "reference: compilation failed: fatal error: no space left"
    assert reason(**variables) == said
    once = times(broken)
    (kept,) = (tmp_path / "sra_ds" / "kernels").glob("*.failed")
    assert kept.name.startswith(Path(kernel_build.library_name()).stem)
    assert reason(**variables) == f"{said} (delete {kept} to try again)"
    assert times(broken) == once
    build_now = [sys.executable, ROOT / "tools" / "build_kernels.py"]
    subprocess.run(build_now, env=environment() | variables, capture_output=True, check=False)
    assert times(broken) > once


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A folder whose name has everything that ninja reads in its own way, with sources of a few lines."""
    folder = tmp_path / "my $kernels: new"
    folder.mkdir()
    (folder / "answer.h").write_text("#define SRA_ANSWER 42\n", "utf-8")
    (folder / "answer.cpp").write_text(
        '#include "answer.h"\nint answer() { return SRA_ANSWER; }\n', "utf-8"
    )
    monkeypatch.setattr(kernel_build, "source_folder", lambda: folder)
    return folder


needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("ninja") is None, reason="needs c++ and ninja"
)


@needs_compiler
def test_sources_may_lie_anywhere(sources, tmp_path):
    assert kernel_build.build(tmp_path / "my $cache: new", ()).exists()


@needs_compiler
def test_what_failed_is_tried_again_if_asked_for_or_with_another_compiler_or_other_sources(
    sources, broken, monkeypatch, tmp_path
):
    def attempt(again: bool = False) -> int:
        with pytest.raises(kernel_build.BuildError, match="no space left"):
            kernel_build.build(tmp_path / "cache", (), again)
        return times(broken)

    monkeypatch.setenv("CXX", str(broken))
    assert [attempt(), attempt(), attempt(again=True), attempt()] == [1, 1, 2, 2]
    broken.write_text(broken.read_text("utf-8").replace("fatal", "newer: fatal"), "utf-8")
    assert [attempt(), attempt()] == [3, 3]
    (sources / "answer.h").write_text("#define SRA_ANSWER 43\n", "utf-8")
    assert [attempt(), attempt()] == [4, 4]
    monkeypatch.delenv("CXX")
    assert kernel_build.build(tmp_path / "cache", ()).exists()


@needs_compiler
def test_an_interruption_is_no_failure_of_the_compiler(sources, broken, monkeypatch, tmp_path):
    broken.write_text(broken.read_text("utf-8").replace("fatal error", "stopped"), "utf-8")
    monkeypatch.setenv("CXX", str(broken))
    for attempts in (1, 2):
        with pytest.raises(kernel_build.BuildError, match="compilation failed"):
            kernel_build.build(tmp_path / "cache", ())
        assert times(broken) == attempts


def test_without_sources_the_reference_is_used_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_build, "source_folder", lambda: tmp_path)
    with pytest.raises(kernel_build.BuildError, match="no kernel sources in"):
        kernel_build.build(tmp_path, ())
    found = extension_module._load.__wrapped__("auto")
    assert found == (frozenset(), f"reference: no kernel sources in {tmp_path}")


@needs_compiler
def test_a_compiler_that_is_too_old_is_told_what_is_needed():
    numbers = kernel_build.source_folder() / "cpu" / "numbers.h"
    as_11 = ["c++", "-U__clang__", "-U__GNUC__", "-D__GNUC__=11", "-fsyntax-only", "-xc++"]
    ran = subprocess.run([*as_11, numbers], capture_output=True, text=True, check=False)
    first = next(line for line in ran.stderr.splitlines() if "error" in line)
    assert "#error GCC 12 or later is needed" in first


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
    assert not runs_compiled(torch.randn(3, 4), torch.randn(40, 4), 33)


@pytest.mark.parametrize(
    ("archs", "capability", "served"),
    [
        ("80", (8, 0), True), ("80", (8, 6), True), ("86", (8, 0), False), ("80", (9, 0), False),
        ("80+PTX", (9, 0), True), ("90+PTX", (8, 9), False), ("80;90+PTX", (12, 0), True),
        ("100", (10, 3), True), ("", (8, 0), False),
    ],
)  # fmt: skip
def test_code_runs_on_gpus_of_its_generation_and_ptx_on_later_ones(archs, capability, served):
    parsed = kernel_build.parse_archs(archs)
    assert kernel_build.serves(parsed, capability) == served
    assert kernel_build.archs_of(Path(kernel_build.library_name(parsed))) == parsed


@pytest.mark.parametrize("archs", ["70", "sm_90", "90+ptx", "9.0"])
def test_architectures_that_are_none_are_refused(archs):
    with pytest.raises(
        kernel_build.BuildError, match=r"expected numbers from 80 on, as 80;90\+PTX"
    ):
        kernel_build.parse_archs(archs)


@pytest.mark.parametrize(
    ("asked", "torch_cuda", "toolkit", "archs", "reason"),
    [
        ("0", 13, 13, (), "SRA_CUDA=0"),
        ("auto", None, 13, (), "this torch has no CUDA"),
        ("auto", 13, None, (), "there is no CUDA toolkit (CUDA_HOME)"),
        ("1", None, None, (), "there is no CUDA toolkit (CUDA_HOME)"),
        ("auto", 12, 13, (), "torch is for CUDA 12, {home} is 13"),
        ("auto", 13, 13, ("86", "90+PTX"), ""),
        ("1", None, 13, ("86", "90+PTX"), ""),
    ],
)  # fmt: skip
def test_what_is_built_for_gpus(monkeypatch, tmp_path, asked, torch_cuda, toolkit, archs, reason):
    monkeypatch.setenv("SRA_CUDA", asked)
    monkeypatch.setenv("SRA_CUDA_ARCHS", "86; 90+PTX")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda.h").write_text(f"#define CUDA_VERSION {toolkit}000\n", "utf-8")
    monkeypatch.setattr(kernel_build, "_torch_cuda", lambda: torch_cuda)
    monkeypatch.setattr(kernel_build, "cuda_home", lambda: toolkit and tmp_path)
    assert kernel_build.wanted() == (archs, reason.format(home=tmp_path))


def test_a_wish_that_makes_no_sense_leaves_the_kernels_for_cpus(monkeypatch, tmp_path):
    monkeypatch.setenv("SRA_CUDA", "yes")
    monkeypatch.setattr(kernel_build, "build", lambda folder, archs, again: folder / str(archs))
    built = kernel_build.build_what_is_wanted(tmp_path)
    assert built == (tmp_path / "()", "SRA_CUDA=yes: expected 0, 1 or auto")


@pytest.fixture
def libraries(monkeypatch, tmp_path):
    """An installation and a cache of libraries that are names alone, and what a compiler would give."""

    def arrange(installed: list[str], cached: list[str], built: str | Exception):
        cache = tmp_path / "cache" / "sra_ds" / "kernels"
        package = tmp_path / "package"
        for folder, names in ((package, installed), (cache, cached)):
            folder.mkdir(parents=True)
            for archs in names:
                (folder / kernel_build.library_name(kernel_build.parse_archs(archs))).touch()

        def build_what_is_wanted(folder):
            if isinstance(built, Exception):
                raise built
            archs = kernel_build.parse_archs(built)
            why = "" if archs else "no toolkit"
            return folder / kernel_build.library_name(archs), why

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(extension_module, "PACKAGE", package)
        monkeypatch.setattr(extension_module, "build_what_is_wanted", build_what_is_wanted)
        why = "no toolkit" if built == "" else ""
        monkeypatch.setattr(extension_module, "wanted", lambda: kernel_build.Wanted((), why))

    return arrange


BROKEN = kernel_build.BuildError("nvcc fails")


@pytest.mark.parametrize(
    ("installed", "cached", "built", "capability", "archs", "how"),
    [
        ([""], [], BROKEN, None, "", "installed with the package"),
        (["90"], [], BROKEN, None, "90", "installed with the package"),
        (["80;90"], [], BROKEN, (8, 6), "80;90", "installed with the package"),
        ([""], ["86"], BROKEN, (8, 6), "86", "built on this machine before"),
        ([""], ["90"], "86", (8, 6), "86", "built on first use"),
        ([""], [], BROKEN, (8, 6), "", "installed with the package; not for this GPU: nvcc fails"),
        ([""], [], "", (8, 6), "", "installed with the package; not for this GPU: no toolkit"),
        ([], [], "", (8, 6), "", "built on first use; not for this GPU: no toolkit"),
        ([], [], "90", (8, 6), "90", "built on first use; not for this GPU: SRA_CUDA_ARCHS names others"),
    ],
)  # fmt: skip
def test_the_library_that_serves_the_gpu_is_chosen(
    libraries, installed, cached, built, capability, archs, how
):
    libraries(installed, cached, built)
    present = frozenset() if capability is None else frozenset({capability})
    path, found = extension_module._library(present)
    assert (";".join(kernel_build.archs_of(path)), found) == (archs, how)


def test_nothing_to_load_and_nothing_to_build_is_an_error(libraries):
    libraries([], [], BROKEN)
    with pytest.raises(kernel_build.BuildError, match="nvcc fails"):
        extension_module._library(frozenset({(8, 6)}))


def test_a_cache_that_cannot_be_written_leaves_the_installed_library(
    libraries, monkeypatch, tmp_path
):
    libraries([""], [], BROKEN)
    (tmp_path / "no-folder").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-folder"))
    monkeypatch.setattr(extension_module, "build_what_is_wanted", kernel_build.build_what_is_wanted)
    monkeypatch.setattr(kernel_build, "wanted", lambda: kernel_build.Wanted(("86",), ""))
    path, how = extension_module._library(frozenset({(8, 6)}))
    assert path.name == kernel_build.library_name()
    assert how.startswith("installed with the package; not for this GPU: ")
    assert "Not a directory" in how or "File exists" in how


def test_every_gpu_of_the_process_is_served(libraries):
    libraries(["80"], ["80;90"], BROKEN)
    path, _ = extension_module._library(frozenset({(8, 0), (9, 0)}))
    assert kernel_build.archs_of(path) == ("80", "90")


def test_probes_that_fail_or_hang_say_nothing(monkeypatch):
    assert kernel_build._output(["/nowhere/nvidia-smi"]) == ""

    def hang(*_, **options):
        raise subprocess.TimeoutExpired("nvidia-smi", options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    assert kernel_build._output(["nvidia-smi"]) == ""
