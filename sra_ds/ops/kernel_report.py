"""What the CUDA compiler says of each kernel: its registers, and what did not fit into them."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from sra_ds.ops.kernel_build import BuildError

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class KernelReport(NamedTuple):
    """One kernel compiled for one architecture; `spilled` is bytes of a thread written to memory because
    registers did not hold them."""

    kernel: str
    arch: str
    registers: int
    spilled: int


def kernel_reports(folder: Path) -> list[KernelReport]:
    """Of the kernels last compiled in `folder`, where `build` has left the compiler's words."""
    found = []
    for log in sorted(folder.glob("*.cu.o.log")):
        source = log.name.removesuffix(".cu.o.log").removeprefix("cuda-")
        for match in ENTRY.finditer(log.read_text("utf-8")):
            kernel = f"{source}: {_readable(match['name'])}"
            spilled = int(match["stores"])
            found.append(KernelReport(kernel, match["arch"], int(match["registers"]), spilled))
    if not found:
        raise BuildError(f"no reports of the CUDA compiler in {folder}")
    return found


def _readable(mangled: str) -> str:
    """'forward<128>' of its symbol."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return mangled
    said = subprocess.run([tool, mangled], capture_output=True, text=True, check=True).stdout
    name = said.split("(anonymous namespace)::")[-1].split("(")[0]
    return name.replace("sra::", "").replace("__nv_", "").replace(" >", ">").strip()
