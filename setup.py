"""Build entry point: the compiled kernels beside the package; the metadata is in pyproject.toml.

Without a compiler or torch at hand the package installs all the same: kernels are then compiled on first
use, or replaced by the torch functions that define them. SRA_CUDA=0|1|auto and SRA_CUDA_ARCHS say for
which GPUs they are compiled, as sra_ds/ops/kernel_build.py explains.
"""

import importlib.util
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location(
    "kernel_build", ROOT / "sra_ds" / "ops" / "kernel_build.py"
)
kernel_build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kernel_build)


class BuildKernels(build_ext):
    """ninja does the work; a failure is reported and passed over."""

    library = kernel_build.library_name()

    def run(self) -> None:
        """Libraries of older sources go at the end."""
        super().run()
        present = Path(kernel_build.library_name()).stem
        for package in (ROOT / "sra_ds", Path(self.build_lib, "sra_ds")):
            for library in package.glob("_kernels_*.so"):
                if not library.stem.startswith(present):
                    library.unlink()

    def build_extension(self, ext: Extension) -> None:
        """Build, and put the library where the package looks for it."""
        try:
            built, why = kernel_build.build_what_is_wanted(
                Path(self.build_temp).absolute(), again=True
            )
        except kernel_build.BuildError as error:
            self.warn(f"sra_ds is installed without compiled kernels: {error}")
            return
        if why:
            self.warn(f"the compiled kernels are for CPUs alone: {why}")
        self.library = built.name
        kernel_build.install(built, Path(self.get_ext_fullpath(ext.name)))

    def get_ext_filename(self, name: str) -> str:
        """No tag of a Python: the library does not know any."""
        return str(Path(*name.split(".")[:-1], self.library))


class BuildPython(build_py):
    """The sources of the kernels travel with the package."""

    def run(self) -> None:
        """Copy them into it."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(
                ROOT / "kernels", Path(self.build_lib, "sra_ds", "kernels"), dirs_exist_ok=True
            )


setup(
    ext_modules=[Extension("sra_ds._kernels", [], optional=True)],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
)
