"""Tensors in parts: however they were split, any range of them can be read, or it is said what lacks."""

import itertools
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sra_ds.errors import CheckpointError
from sra_ds.storage.fragments import Fragment, Range, TensorFiles, whole_tensor, write_fragments


def part_of(whole: Tensor, start: int, stop: int) -> Fragment:
    return Fragment(Range(tuple(whole.shape), start, stop), whole.reshape(-1)[start:stop].clone())


def write_parts(folder: Path, whole: Tensor, cuts: list[int]) -> TensorFiles:
    """`w` cut at the given places, each part in a file of its own."""
    for number, bounds in enumerate(itertools.pairwise([0, *cuts, whole.numel()])):
        write_fragments(folder / f"{number}.safetensors", {"w": part_of(whole, *bounds)})
    return TensorFiles(folder.glob("*.safetensors"))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_split_gives_any_range(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    size = math.prod(shape)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, size - 1)), max_size=4)) - {size})
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    whole = torch.randn(shape)
    with TemporaryDirectory() as folder:
        files = write_parts(Path(folder), whole, cuts)
        values = torch.full((stop - start,), torch.nan)
        files.read_into("w", start, values)
        assert torch.equal(values, whole.reshape(-1)[start:stop])
        assert files.names == ["w"] and files.shape("w") == tuple(shape)
        assert torch.equal(files.read("w"), whole)


def test_parts_may_overlap_and_come_in_any_order(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(2, 12)
    for name, bounds in {"a": (10, 24), "b": (0, 6), "c": (4, 15)}.items():
        write_fragments(tmp_path / f"{name}.safetensors", {"w": part_of(whole, *bounds)})
    assert torch.equal(TensorFiles(tmp_path.glob("*")).read("w"), whole)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_gap_is_an_error_only_for_ranges_that_need_it(tmp_path: Path, missing: int) -> None:
    whole = torch.arange(30.0)
    write_parts(tmp_path, whole, [10, 20])
    (tmp_path / f"{missing}.safetensors").unlink()
    files = TensorFiles(tmp_path.glob("*"))
    with pytest.raises(CheckpointError, match="of w are not all there"):
        files.read("w")
    for part in range(3):
        values = torch.zeros(10)
        if part == missing:
            with pytest.raises(CheckpointError, match=f"elements {10 * part} to {10 * part + 10}"):
                files.read_into("w", 10 * part, values)
        else:
            files.read_into("w", 10 * part, values)
            assert torch.equal(values, whole[10 * part : 10 * part + 10])


def test_a_name_that_no_file_has_is_an_error(tmp_path: Path) -> None:
    files = write_parts(tmp_path, torch.zeros(3), [])
    with pytest.raises(CheckpointError, match="of v are not all there"):
        files.read_into("v", 0, torch.zeros(1))


def test_whole_tensors_are_plain_safetensors(tmp_path: Path) -> None:
    """Any tool reads them: own shape and dtype, and nothing is said of parts."""
    tensors = {
        "matrix": torch.randn(3, 4).T,
        "scalar": torch.tensor(7.0),
        "counts": torch.arange(3),
        "bf16": torch.randn(5).bfloat16(),
    }
    path = tmp_path / "model.safetensors"
    write_fragments(path, {name: whole_tensor(tensor) for name, tensor in tensors.items()})
    loaded = load_file(path)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "fragments": "{}"}
    assert path.stat().st_mode & 0o444 == 0o444


def test_plain_safetensors_of_others_can_be_read(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3)
    save_file({"w": tensor}, tmp_path / "theirs.safetensors")
    files = TensorFiles([tmp_path / "theirs.safetensors"])
    assert torch.equal(files.read("w"), tensor)
    values = torch.zeros(2)
    files.read_into("w", 3, values)
    assert torch.equal(values, tensor[1, :2])


def test_reading_keeps_every_bit_and_takes_the_readers_dtype(tmp_path: Path) -> None:
    whole = torch.tensor([1 + 2**-23, float("nan"), float("-inf"), -0.0, 1e-45])
    files = write_parts(tmp_path, whole, [2])
    assert torch.equal(files.read("w").view(torch.int32), whole.view(torch.int32))
    halves = torch.zeros(5, dtype=torch.bfloat16)
    files.read_into("w", 0, halves)
    assert halves[0] == 1 and halves[1].isnan()


@pytest.mark.parametrize(
    "header",
    [
        "no JSON",
        "[]",
        '{"w": 5}',
        '{"w": {"shape": [9]}}',
        '{"w": {"shape": 9, "start": 0}}',
        '{"w": {"shape": ["9"], "start": 0}}',
        '{"w": {"shape": [-3, -3], "start": 0}}',
        '{"w": {"shape": [9], "start": -1}}',
        '{"w": {"shape": [9], "start": 7}}',
        '{"w": {"shape": [9], "start": 0.5}}',
    ],
)
def test_an_impossible_range_is_an_error(tmp_path: Path, header: str) -> None:
    path = tmp_path / "part.safetensors"
    save_file({"w": torch.zeros(3)}, path, {"fragments": header})
    with pytest.raises(CheckpointError, match=f"{path} is damaged"):
        TensorFiles([path])


def test_parts_of_different_tensors_are_an_error(tmp_path: Path) -> None:
    for name, shape in {"a": (6,), "b": (2, 3)}.items():
        write_fragments(tmp_path / f"{name}.safetensors", {"w": whole_tensor(torch.zeros(shape))})
    with pytest.raises(CheckpointError, match=r"b\.safetensors is damaged .*of w"):
        TensorFiles(tmp_path.glob("*"))


@pytest.mark.parametrize("damage", ["cut", "noise", "gone", "folder"])
def test_an_unreadable_file_names_its_folder(tmp_path: Path, damage: str) -> None:
    write_parts(tmp_path, torch.zeros(100), [])
    path = next(tmp_path.glob("*"))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "noise":
        path.write_bytes(b"\xff" * 64)
    elif damage == "folder":
        path = tmp_path / "w.safetensors"
        path.mkdir()
    else:
        path = tmp_path / "never.safetensors"
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        TensorFiles([path])
