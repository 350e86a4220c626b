"""Building kernels/ into one shared library with ninja: for setup.py, and on first use without it.

    sources -> objects -> _kernels_<hash of the sources>.so                      for CPUs
                          _kernels_<hash of the sources>_cuda_80_90ptx.so        for GPUs too

The library speaks LibTorch's Stable ABI and no Python, so it serves every torch from 2.11 on and every
Python. It can be built for GPUs where there is none. This file needs neither torch nor a GPU: setup.py
runs it by itself.

SRA_CUDA says whether GPUs are built for: 0, 1 or auto, which does it if torch is a CUDA build and a CUDA
toolkit is there. SRA_CUDA_ARCHS names compute capabilities, "80;86;90+PTX"; +PTX is for later ones too.
"""

import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]
STABLE_ABI = "0x020b000000000000"
"""torch 2.11, the oldest that can load the library."""
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math"
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v"
OLDEST_ARCH = 80
"""bfloat16 matrix instructions and copies in the background begin there."""
UNITS, HEADERS = (".cpp", ".cu"), (".h",)
EVERYWHERE = "80;90+PTX"
"""Architectures where none is asked for and no GPU is there to be asked."""
NINJA = """
cxx = {cxx}
nvcc = {nvcc}
libraries = -Wl,--no-as-needed -L{lib} -ltorch_cpu -ltorch -lc10 {cuda_libraries}
flags = {flags} -DTORCH_TARGET_VERSION={abi} -isystem {include}
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compiling $in
rule compile_cuda
  command = $nvcc {cuda_flags} -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)
  depfile = $out.d
  deps = gcc
  description = compiling $in
rule link
  command = $cxx -shared -o $out.part $in $libraries && mv $out.part $out
  description = linking $out
"""


class BuildError(Exception):
    """Why the library cannot be built here, in one line."""


def source_folder() -> Path:
    """kernels/ of the checkout, or its copy in an installed package."""
    inside = PACKAGE / "kernels"
    return inside if inside.is_dir() else PACKAGE.parent / "kernels"


@functools.cache
def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, or where nvcc is; None without one. nvcc may be a script that calls
    the real one, which is asked then."""
    nvcc = shutil.which("nvcc")
    candidates = [Path(home) for home in (os.environ.get("CUDA_HOME"),) if home]
    if nvcc is not None:
        candidates.append(Path(nvcc).resolve().parents[1])
        said = _output([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull])
        candidates += [Path(top) for top in re.findall(r"^#\$ TOP=(.+)$", said, re.MULTILINE)]
    candidates.append(Path("/usr/local/cuda"))
    for home in candidates:
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home.resolve()
    return None


def parse_archs(text: str) -> tuple[str, ...]:
    """Of a list like "80;90+PTX"; raises `BuildError`."""
    archs = tuple(part.strip() for part in text.split(";") if part.strip())
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}(\+PTX)?", arch) or _number(arch) < OLDEST_ARCH:
            raise BuildError(
                f"CUDA architecture {arch}: expected numbers from {OLDEST_ARCH} on, as {EVERYWHERE}"
            )
    return archs


class Wanted(NamedTuple):
    """Architectures to build for, () for CPUs alone, and then why."""

    archs: tuple[str, ...]
    reason: str


def wanted() -> Wanted:
    """What SRA_CUDA and SRA_CUDA_ARCHS ask for, as far as it is possible here; raises `BuildError` if
    they make no sense."""
    asked = os.environ.get("SRA_CUDA", "auto")
    if asked not in ("0", "1", "auto"):
        raise BuildError(f"SRA_CUDA={asked}: expected 0, 1 or auto")
    if asked == "0":
        return Wanted((), "SRA_CUDA=0")
    torch_cuda, home = _torch_cuda(), cuda_home()
    if asked == "auto" and torch_cuda is None:
        return Wanted((), "this torch has no CUDA")
    if home is None:
        return Wanted((), "there is no CUDA toolkit (CUDA_HOME)")
    if asked == "auto" and _toolkit_version(home) != torch_cuda:
        return Wanted((), f"torch is for CUDA {torch_cuda}, {home} is {_toolkit_version(home)}")
    named = os.environ.get("SRA_CUDA_ARCHS") or _archs_here() or EVERYWHERE
    return Wanted(parse_archs(named), "")


def asked_for(archs: str | None) -> Wanted:
    """`wanted`, or GPUs of `archs`; raises `BuildError` if GPUs are insisted on in vain."""
    if archs is None and os.environ.get("SRA_CUDA") != "1":
        return wanted()
    found = wanted() if archs is None else Wanted(parse_archs(archs), "")
    if not found.archs or cuda_home() is None:
        raise BuildError("there is no CUDA toolkit: set CUDA_HOME")
    return found


def library_name(archs: tuple[str, ...] = ()) -> str:
    """File name of the library these sources give for CPUs and GPUs of `archs`; raises `BuildError` if
    there are none."""
    how = (FLAGS, CUDA_FLAGS, NINJA, STABLE_ABI, platform.machine())
    digest = hashlib.sha256("".join(how).encode())
    folder = source_folder()
    if not _sources(UNITS):
        raise BuildError(f"no kernel sources in {folder}")
    for path in _sources(UNITS + HEADERS):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    cuda = "".join("_" + arch.replace("+PTX", "ptx") for arch in archs)
    return f"_kernels_{digest.hexdigest()[:12]}{'_cuda' if archs else ''}{cuda}.so"


def archs_of(library: Path) -> tuple[str, ...]:
    """Architectures a library was built for, from its name."""
    _, _, archs = library.stem.partition("_cuda_")
    return tuple(arch.replace("ptx", "+PTX") for arch in archs.split("_") if arch)


def serves(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for `archs` runs on a GPU: that of its generation up to it, or PTX of an older one."""
    for arch in archs:
        major, minor = divmod(_number(arch), 10)
        if (major == capability[0] and minor <= capability[1]) or (
            arch.endswith("+PTX") and (major, minor) <= capability
        ):
            return True
    return False


def build_what_is_wanted(folder: Path, again: bool = False) -> tuple[Path, str]:
    """The library for GPUs if they are wanted and it can be built, else that for CPUs, and why. Raises
    `BuildError` if there is neither. `again`: also what has failed before."""
    try:
        archs, reason = wanted()
        if archs:
            return build(folder, archs, again), ""
    except BuildError as error:
        reason = str(error)
    return build(folder, (), again), reason


def build(folder: Path, archs: tuple[str, ...], again: bool = False) -> Path:
    """The library in `folder`, where objects and the compiler's words are left too; one process compiles,
    others wait for it. Raises `BuildError`, at once if the same compiler has failed on it before, unless
    it is to try `again`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            library = folder / library_name(archs)
            if not library.exists():
                _compile(library, archs, again)
            return library
    except OSError as error:
        raise BuildError(f"{error.filename or folder}: {error.strerror or error}") from None


def install(library: Path, target: Path) -> None:
    """Copy it there, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    shutil.copy2(library, part)
    os.replace(part, target)


def _compile(library: Path, archs: tuple[str, ...], again: bool) -> None:
    cxx, torch = shlex.split(os.environ.get("CXX", "c++")), find_spec("torch")
    if shutil.which("ninja") is None or shutil.which(cxx[0]) is None:
        raise BuildError("no ninja" if shutil.which("ninja") is None else "no C++ compiler")
    if torch is None or torch.origin is None:
        raise BuildError("torch is not installed where this is built")
    text = _ninja_file(shlex.join(cxx), Path(torch.origin).parent, library, archs)
    tried = hashlib.sha256((text + _output([*cxx, "--version"])).encode()).hexdigest()[:12]
    failure = library.with_name(f"{library.stem}_{tried}.failed")
    if failure.exists() and not again:
        raise BuildError(f"{failure.read_text('utf-8')} (delete {failure} to try again)")
    (library.parent / "build.ninja").write_text(text, "utf-8")
    command = ["ninja", "-C", str(library.parent)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        errors = [line for line in ran.stdout.splitlines() if "error" in line]
        reason = f"compilation failed: {(errors or [ran.stdout[-300:]])[0]}"
        if errors:  # else it was interrupted
            failure.write_text(reason, "utf-8")
        raise BuildError(reason)


def gencode(archs: tuple[str, ...]) -> str:
    """nvcc's options for `archs`."""
    options = []
    for arch in archs:
        number = _number(arch)
        options.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            options.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(options)


def _number(arch: str) -> int:
    return int(arch.removesuffix("+PTX"))


def _sources(suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in source_folder().rglob("*") if path.suffix in suffixes)


def _ninja_file(cxx: str, torch: Path, library: Path, archs: tuple[str, ...]) -> str:
    home = cuda_home() if archs else None
    include, lib = (_escaped(shlex.quote(str(torch / part))) for part in ("include", "lib"))
    text = NINJA.format(
        cxx=_escaped(cxx), flags=FLAGS, abi=STABLE_ABI, include=include, lib=lib,
        nvcc=_escaped(shlex.quote(str(home / "bin" / "nvcc"))) if home else "",
        cuda_flags=f"{CUDA_FLAGS} {gencode(archs)}",
        cuda_libraries=f"{_escaped(_static_runtime(home))} -ldl -lrt -lpthread" if home else "",
    )  # fmt: skip
    lines, objects = [], []
    for unit in _sources(UNITS):
        if unit.parent.name == "cuda" and not archs:
            continue
        name = unit.relative_to(source_folder()).as_posix().replace("/", "-") + ".o"
        rule = "compile_cuda" if unit.suffix == ".cu" else "compile"
        lines.append(f"build {name}: {rule} {_escaped(str(unit))}")
        objects.append(name)
    return "\n".join([text, *lines, f"build {library.name}: link {' '.join(objects)}", ""])


def _escaped(text: str) -> str:
    """As ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", text)


def _static_runtime(home: Path) -> str:
    """CUDA's runtime, linked in, so that the library does not ask for that of one version."""
    for part in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (home / part / "libcudart_static.a").exists():
            return shlex.quote(str(home / part / "libcudart_static.a"))
    raise BuildError(f"no libcudart_static.a under {home}")


def _torch_cuda() -> int | None:
    """The major version of CUDA torch was built for, found without importing it; None for CPU builds."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    said = (Path(torch.origin).parent / "version.py").read_text("utf-8")
    found = re.search(r"^cuda.*= *['\"](\d+)", said, re.MULTILINE)
    return int(found[1]) if found else None


def _toolkit_version(home: Path) -> int | None:
    """Its major version."""
    header = home / "include" / "cuda.h"
    said = header.read_text("utf-8", "replace") if header.exists() else ""
    found = re.search(r"^#define CUDA_VERSION (\d+)", said, re.MULTILINE)
    return int(found[1]) // 1000 if found else None


def _archs_here() -> str:
    """Those of this machine's GPUs, "" if there are none or nobody to ask."""
    if shutil.which("nvidia-smi") is None:
        return ""
    said = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    found = {int(cap.replace(".", "")) for cap in re.findall(r"^\d+\.\d+$", said, re.MULTILINE)}
    return ";".join(str(arch) for arch in sorted(found) if arch >= OLDEST_ARCH)


def _output(command: list[str]) -> str:
    """What it prints, "" if it cannot be run or hangs."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ran.stdout + ran.stderr
