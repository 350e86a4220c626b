"""A run directory that was damaged is passed over or read as far as it goes, never a traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sra_ds.config import Recipe
from sra_ds.errors import CheckpointError
from sra_ds.storage.run_dir import RunDir, newest_run


@pytest.mark.parametrize("damage", [b"[]", b"\xff\xfe", b"5", b"{"])
def test_a_run_with_a_damaged_environment_is_passed_over(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, damage: bytes
) -> None:
    recipe = tiny_recipe()
    for name in ("older", "newer"):
        run = RunDir(tmp_path / name)
        run.write_start(recipe, {}, {})
        (run.checkpoints / "1").mkdir()
        (run.checkpoints / "1" / "manifest.json").write_text("{}")
    assert newest_run(recipe.name, tmp_path).path.name == "newer"
    run.environment_file.write_bytes(damage)
    assert newest_run(recipe.name, tmp_path).path.name == "older"
    with pytest.raises(CheckpointError, match=str(run.environment_file)):
        run.environment()


def test_a_line_of_noise_in_the_metrics_is_left_out(tmp_path: Path) -> None:
    run, lines = RunDir(tmp_path), [{"step": 1}, {"step": 3}]
    texts = [json.dumps(line).encode() for line in lines]
    run.metrics_file.write_bytes(b"\n".join([texts[0], b"\xff\xfe", texts[1], b'{"st']))
    assert run.metrics() == lines
