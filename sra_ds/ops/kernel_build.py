"""Building kernels/ into one shared library with ninja: for setup.py, and on first use without it.

    sources -> objects -> _kernels_<hash of the sources>.so

The library speaks LibTorch's Stable ABI and no Python, so it serves every torch from 2.11 on and every
Python. This file needs neither: setup.py runs it by itself.
"""

import hashlib
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
STABLE_ABI = "0x020b000000000000"
"""torch 2.11, the oldest that can load the library."""
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno"
NINJA = """
cxx = {cxx}
libraries = -Wl,--no-as-needed -L{lib} -ltorch_cpu -ltorch -lc10
flags = {flags} -DTORCH_TARGET_VERSION={abi} -isystem {include}
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
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


def library_name() -> str:
    """File name of the library these sources give."""
    digest = hashlib.sha256(FLAGS.encode())
    folder = source_folder()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cpp")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return f"_kernels_{digest.hexdigest()[:12]}.so"


def build(folder: Path) -> Path:
    """Compile what changed and link; objects and library are left in `folder`. Raises `BuildError`."""
    ninja, cxx = shutil.which("ninja"), shutil.which(os.environ.get("CXX", "c++"))
    torch = find_spec("torch")
    if ninja is None or cxx is None:
        raise BuildError("no ninja" if ninja is None else "no C++ compiler")
    if torch is None or torch.origin is None:
        raise BuildError("torch is not installed where this is built")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / library_name()
    home = Path(torch.origin).parent
    (folder / "build.ninja").write_text(_ninja_file(cxx, home, library), "utf-8")
    ran = subprocess.run([ninja, "-C", str(folder)], capture_output=True, text=True, check=False)
    if ran.returncode:
        errors = [line for line in ran.stdout.splitlines() if "error" in line]
        raise BuildError(f"compilation failed: {(errors or [ran.stdout[-300:]])[0]}")
    return library


def _ninja_file(cxx: str, torch: Path, library: Path) -> str:
    source = source_folder()
    units = sorted(source.rglob("*.cpp"))
    objects = [unit.relative_to(source).as_posix().replace("/", "-") + ".o" for unit in units]
    text = NINJA.format(
        cxx=cxx, flags=FLAGS, abi=STABLE_ABI, include=torch / "include", lib=torch / "lib"
    )
    lines = [f"build {name}: compile {unit}" for name, unit in zip(objects, units, strict=True)]
    return "\n".join([text, *lines, f"build {library.name}: link {' '.join(objects)}", ""])
