"""The README: short, and about what is there."""

import re
import subprocess

import pytest

from commands import ROOT

README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("target", ["train", "test", "lint"])
def test_make_targets_exist(target):
    result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_readme_is_short_and_names_only_what_exists():
    assert len(README.splitlines()) <= 250
    assert "@" not in README
    for path in re.findall(r"\b(?:tools|launch|ds_configs|tests)/[\w/]+\.\w+", README):
        assert (ROOT / path).exists(), path


def test_every_shipped_recipe_is_in_the_readme():
    for path in (ROOT / "sra_ds" / "recipes").glob("*.yaml"):
        assert f"`{path.stem}`" in README, path.stem
