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
    """Of the kernels compiled in `folder`, where `build` has left the compiler's words."""
    found = []
    for log in sorted(folder.glob("*.cu.o.log")):
        source = log.name.removesuffix(".cu.o.log").removeprefix("cuda-")
        for match in ENTRY.finditer(log.read_text("utf-8")):
            registers, spilled = int(match["registers"]), int(match["stores"])
            found.append((source, KernelReport(match["name"], match["arch"], registers, spilled)))
    if not found:
        raise BuildError(f"no reports of the CUDA compiler in {folder}")
    names = _readable([report.kernel for _, report in found])
    return [
        report._replace(kernel=f"{source}: {name}")
        for (source, report), name in zip(found, names, strict=True)
    ]


def _readable(symbols: list[str]) -> list[str]:
    """'forward<128>' and the like of symbols."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return symbols
    said = subprocess.run(
        [tool], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    names = (
        line.split("(anonymous namespace)::")[-1].split("(")[0] for line in said.stdout.splitlines()
    )
    return [
        name.replace("sra::", "").replace("__nv_", "").replace(" >", ">").strip() for name in names
    ]
