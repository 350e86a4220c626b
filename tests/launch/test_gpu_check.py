"""What `tools/gpu_check.sh` makes of the exit codes of its parts, with a Python that only has some."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from commands import ROOT, environment

STUB = f"""#!/usr/bin/env bash
[[ $1 == - ]] && exec {sys.executable} "$@"
exit "$STUB_CODE"
"""


def check(folder: Path, parts: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The script with these parts, each of which ends with that code."""
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    own = {"PYTHON": str(stub), "PARTS": parts, "WHEELS": str(folder), "STUB_CODE": str(code)}
    command = ["bash", ROOT / "tools" / "gpu_check.sh", folder / "out"]
    return subprocess.run(
        command, env={**environment(), **own}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("parts", "code", "ends", "says"),
    [
        ("router tests", 0, 0, ""),
        ("tests", 5, 0, ""),
        ("router tests", 5, 1, "error: failed: router\n"),
        ("kernels selftest", 1, 1, "error: failed: kernels selftest\n"),
        (" ", 0, 1, "error: no part was run\n"),
    ],
)
def test_a_check_passes_where_something_ran_and_nothing_failed(
    tmp_path: Path, parts: str, code: int, ends: int, says: str
) -> None:
    result = check(tmp_path, parts, code)
    assert (result.returncode, result.stderr) == (ends, says)
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert all(found[name]["exit"] == code for name in parts.split())


def test_a_part_that_is_none_is_named_before_anything_runs(tmp_path: Path) -> None:
    result = check(tmp_path, "router_test tests")
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert result.stderr.startswith("error: PARTS has router_test; there are kernels router_tests")
    assert len(result.stderr.splitlines()) == 1
