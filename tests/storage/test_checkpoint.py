"""Checkpoints are complete or absent, on every process alike.

Two connected processes go through all scenes in one start; each test looks at one of them.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distributed import run_ranks
from sra_ds.errors import CheckpointError
from sra_ds.files import file_sha256
from sra_ds.storage import checkpoint
from sra_ds.storage.checkpoint import Contents, Layout, save_checkpoint, verify, verify_together
from sra_ds.storage.fragments import Fragment, Range, whole_tensor

EXPERTS_EF = torch.arange(24.0).view(4, 6)
DENSE = torch.arange(6.0)
LAYOUT = Layout(2, 3, 2)
FACTS = {"step": 3, "tokens": 384, "dead": [[], [1]]}


def contents_of(rank: int, world: int, shift: float = 0.0) -> Contents:
    """Experts in equal parts; the dense tensor on rank 0, the optimizer's on the last rank."""
    held = range(rank * 4 // world, (rank + 1) * 4 // world)
    part = Range((4, 6), held.start * 6, held.stop * 6)
    experts = {"experts": Fragment(part, EXPERTS_EF[held.start : held.stop].reshape(-1) + shift)}
    dense = {"dense": whole_tensor(DENSE + shift)} if rank == 0 else {}
    state = {"dense/exp_avg": whole_tensor(DENSE / 2)} if rank == world - 1 else {}
    tensors = {checkpoint.WEIGHTS: {**experts, **dense}, checkpoint.OPTIMIZER: state}
    return Contents(tensors, {"step": 3, "top_k": 2}, FACTS, held)


def save_alone(folder: Path, shift: float = 0.0) -> Path:
    save_checkpoint(folder, contents_of(0, 1, shift), Layout())
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    files = checkpoint.open_tensors(folder, checkpoint.WEIGHTS)
    return {name: files.read(name) for name in files.names}


def complaint(act: Callable[[], Any]) -> str:
    """What `act` raised as a failure of files; nothing if it did not."""
    try:
        act()
    except (OSError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_one_process_writes_one_file_of_each_kind(tmp_path: Path) -> None:
    folder = save_alone(tmp_path / "3")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["manifest.json", "model.safetensors", "optimizer.safetensors", "trainer.json"]
    assert torch.equal(weights(folder)["experts"], EXPERTS_EF)
    assert json.loads((folder / "trainer.json").read_text()) == {"step": 3, "top_k": 2}
    assert not list(tmp_path.glob("*.partial"))


def test_no_optimizer_state_no_file(tmp_path: Path) -> None:
    contents = contents_of(0, 1)
    del contents.tensors[checkpoint.OPTIMIZER]
    save_checkpoint(tmp_path / "best-3", contents, Layout())
    assert not list(tmp_path.glob("*/optimizer*"))
    with pytest.raises(
        CheckpointError, match=r"holds no optimizer files; .*--init-from.*--reshard"
    ):
        checkpoint.open_tensors(tmp_path / "best-3", checkpoint.OPTIMIZER)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing weights": (lambda f: (f / "model.safetensors").unlink(), "is missing"),
    "flipped byte": (lambda f: flip_last_byte(f / "optimizer.safetensors"), "is damaged"),
    "cut file": (lambda f: cut_last_byte(f / "model.safetensors"), "is damaged"),
    "flipped trainer": (lambda f: flip_last_byte(f / "trainer.json"), "is damaged"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "not readable as JSON"),
    "cut manifest": (lambda f: cut_last_byte(f / "manifest.json"), "not readable as JSON"),
    "other schema": (lambda f: edit(f, schema_version=1), "schema version 1 is unknown"),
    "schema of two lines": (lambda f: edit(f, schema_version="1\n2"), "is unknown"),
    "noise for a manifest": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "as JSON"),
    "nested manifest": (lambda f: (f / "manifest.json").write_text("[" * 99_999), "as JSON"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), "no JSON object"),
    "manifest a folder": (lambda f: folder_for(f / "manifest.json"), "not readable as JSON"),
    "no files listed": (lambda f: edit(f, files=None), "does not list the files"),
    "files a list": (lambda f: edit(f, files=["trainer.json"]), "does not list the files"),
    "trainer not listed": (lambda f: relist(f, "trainer.json", None), "does not list the files"),
    "weights not listed": (lambda f: relist(f, "model.safetensors", None), "does not list the"),
    "entry a number": (lambda f: relist(f, "trainer.json", 5), "at the file 'trainer.json'"),
    "entry without hash": (lambda f: relist(f, "trainer.json", {"bytes": 5}), "at the file"),
    "file elsewhere": (lambda f: relist(f, "../9/trainer.json", sized(24)), "at the file"),
    "size a text": (lambda f: relist(f, "trainer.json", sized("24")), "trainer.json is damaged"),
    "size negative": (lambda f: relist(f, "trainer.json", sized(-1)), "trainer.json is damaged"),
    "name too long": (lambda f: relist(f, 300 * "x", sized(24)), "x is not readable"),
    "garbage after trainer": (lambda f: add_garbage(f / "trainer.json"), "trainer.json is damaged"),
    "trainer a list": (lambda f: rewrite(f, "trainer.json", b"[]"), "no JSON object"),
    "trainer of noise": (lambda f: rewrite(f, "trainer.json", b"\xff\xfe"), "readable as JSON"),
    "weights a folder": (lambda f: folder_for(f / "model.safetensors"), "is missing"),
    "checkpoint a file": (lambda f: file_for(f), "neither a checkpoint's folder nor the name"),
}


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit(folder: Path, **changes: Any) -> None:
    """Other entries of the manifest; None takes one out."""
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def relist(folder: Path, name: str, entry: Any) -> None:
    """Another entry of a file in the manifest; None takes it out."""
    files = {**json.loads((folder / "manifest.json").read_text())["files"], name: entry}
    edit(folder, files={name: entry for name, entry in files.items() if entry is not None})


def sized(size: Any) -> dict[str, Any]:
    return {"bytes": size, "sha256": ""}


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Another content, which the manifest agrees with."""
    (folder / name).write_bytes(data)
    relist(folder, name, {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})


def add_garbage(path: Path) -> None:
    path.write_text(path.read_text() + "garbage")


def folder_for(path: Path) -> None:
    path.unlink()
    path.mkdir()


def file_for(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
    for step in (2, 10, 9):
        save_alone(tmp_path / str(step), float(step))
    checkpoint.point_latest_at(tmp_path / "10")
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["10", "9", "2"]
    act, words = DAMAGES[damage]
    act(tmp_path / "10")
    with pytest.raises(CheckpointError, match=words) as caught:
        verify(tmp_path / "10")
    assert str(tmp_path / "10") in str(caught.value)
    folder, problems = checkpoint.first_complete(checkpoint.candidates(tmp_path))
    assert folder.name == "9" and problems == [str(caught.value)]
    assert torch.equal(weights(folder)["dense"], DENSE + 9)


@pytest.mark.parametrize("damage", ["noise", "folder"])
def test_an_unreadable_latest_is_named_and_the_newest_taken(tmp_path: Path, damage: str) -> None:
    for step in (9, 10):
        save_alone(tmp_path / str(step))
    if damage == "noise":
        (tmp_path / "latest").write_bytes(b"\xff\xfe")
    else:
        (tmp_path / "latest").mkdir()
    folder, (problem,) = checkpoint.first_complete(checkpoint.candidates(tmp_path))
    assert folder.name == "10" and str(tmp_path / "latest") in problem
    assert checkpoint.find(tmp_path, "latest").passed_over == [problem]


def test_folders_that_are_no_steps_are_left_alone(tmp_path: Path) -> None:
    for name in ("3", "²", "٣", "3a", "-1"):
        (tmp_path / name).mkdir()
    assert checkpoint.numbered(tmp_path) == [3]


def test_none_complete_says_why_each_is_not(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_last_byte(save_alone(tmp_path / str(step)) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint; .*/2/.*; .*/1/"):
        checkpoint.first_complete(checkpoint.candidates(tmp_path))


def test_weights_alone_may_be_opened_beside_a_damaged_optimizer(tmp_path: Path) -> None:
    folder = save_alone(tmp_path / "3")
    flip_last_byte(folder / "optimizer.safetensors")
    files, trainer = checkpoint.open_weights(folder)
    assert trainer["step"] == 3 and torch.equal(files.read("dense"), DENSE)
    flip_last_byte(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.open_weights(folder)


def test_latest_counts_before_newer_ones_and_a_stale_name_does_not(tmp_path: Path) -> None:
    for step in (4, 8):
        save_alone(tmp_path / str(step))
    (tmp_path / "6.partial").mkdir()
    for named, order in {"4": ["4", "8"], "12": ["8", "4"], "": ["8", "4"]}.items():
        (tmp_path / "latest").write_text(named)
        assert [path.name for path in checkpoint.candidates(tmp_path)] == order


def test_a_step_saved_again_replaces_the_damaged_one(tmp_path: Path) -> None:
    folder = save_alone(tmp_path / "3")
    flip_last_byte(folder / "model.safetensors")
    (tmp_path / "3.partial").mkdir()  # of a crash
    save_alone(folder, 1.0)
    verify(folder)
    assert torch.equal(weights(folder)["dense"], DENSE + 1)


def scenes(folder: str) -> dict[str, Any]:
    """Every scene on this process: what it was told, as seen after all are done with it."""
    root, found = Path(folder), {}
    for name, scene in SCENES.items():
        (root / name).mkdir(exist_ok=True)
        dist.barrier()
        found[name] = scene(root / name, dist.get_rank())
        dist.barrier()
    return found


def save_together(folder: Path, rank: int, shift: float = 0.0) -> str:
    return complaint(lambda: save_checkpoint(folder, contents_of(rank, 2, shift), LAYOUT))


def saved(root: Path, rank: int) -> str:
    return save_together(root / "3", rank)


def write_fails(root: Path, rank: int, failing: int, target: str) -> tuple[str, str]:
    """A first checkpoint, then a second whose writing fails on one process."""
    first = save_together(root / "3", rank)
    failure = {"side_effect": OSError(28, "No space left on device")} if rank == failing else {}
    with patch.object(checkpoint, target, wraps=getattr(checkpoint, target), **failure):
        second = [save_together(root / name, rank, 1.0) for name in ("3", "4")]
    return first, "; ".join(second)


def damaged(root: Path, rank: int, damage: Callable[[Path], Any]) -> tuple[str, str, list[str]]:
    """(verify_together before, after, what first_complete passed over)."""
    for step in ("2", "3"):
        save_together(root / step, rank)
    before = complaint(lambda: verify_together(root / "3"))
    dist.barrier()
    if rank == 0:
        damage(root / "3" / "model-00001-of-00002.safetensors")
    dist.barrier()
    after = complaint(lambda: verify_together(root / "3"))
    chosen, problems = checkpoint.first_complete([root / "3", root / "2"], verify_together)
    return before, after, [chosen.name, *problems]


def unreadable(root: Path, rank: int) -> list[str]:
    """The disk fails process 1 while it checks step 3; what first_complete passed over."""
    for step in ("2", "3"):
        save_together(root / step, rank)

    def read(path: Path) -> str:
        if rank == 1 and path.parent.name == "3":
            raise OSError(5, "Input/output error")
        return file_sha256(path)

    with patch.object(checkpoint, "file_sha256", read):
        chosen, problems = checkpoint.first_complete([root / "3", root / "2"], verify_together)
    return [chosen.name, *problems]


def unseen(root: Path, rank: int) -> str:
    """Process 1 looks into another folder, as on a machine without the shared disk."""
    save_together(root / "3", rank)
    return complaint(lambda: verify_together(root / ("3" if rank == 0 else "nowhere")))


SCENES: dict[str, Callable[[Path, int], Any]] = {
    "saved": saved,
    "rank 1 cannot write": lambda f, r: write_fails(f, r, 1, "write_fragments"),
    "rank 0 cannot write": lambda f, r: write_fails(f, r, 0, "write_fragments"),
    "rank 0 cannot finish": lambda f, r: write_fails(f, r, 0, "write_atomically"),
    "flipped": lambda f, r: damaged(f, r, flip_last_byte),
    "missing": lambda f, r: damaged(f, r, Path.unlink),
    "unreadable": unreadable,
    "unseen": unseen,
}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """(folder of all scenes, what each process was told)."""
    root = tmp_path_factory.mktemp("scenes")
    return root, run_ranks(2, scenes, str(root))


Played = tuple[Path, list[dict[str, Any]]]


def test_the_manifest_tells_layout_experts_sizes_and_hashes(played: Played) -> None:
    root, told = played
    folder = root / "saved" / "3"
    assert [found["saved"] for found in told] == ["", ""]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["schema_version"] == checkpoint.SCHEMA_VERSION
    assert manifest["layout"] == {"world_size": 2, "zero_stage": 3, "expert_parallel_size": 2}
    assert {key: manifest[key] for key in FACTS} == FACTS
    files = manifest["files"]
    assert set(files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {name: entry["experts"] for name, entry in files.items() if "experts" in entry} == {
        "model-00000-of-00002.safetensors": {"first": 0, "count": 2},
        "model-00001-of-00002.safetensors": {"first": 2, "count": 2},
    }
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    verify(folder)


def test_parts_of_all_processes_are_read_as_whole_tensors(played: Played) -> None:
    folder = played[0] / "saved" / "3"
    assert torch.equal(weights(folder)["experts"], EXPERTS_EF)
    assert torch.equal(weights(folder)["dense"], DENSE)
    optimizer = checkpoint.open_tensors(folder, checkpoint.OPTIMIZER)
    assert torch.equal(optimizer.read("dense/exp_avg"), DENSE / 2)


def test_a_checkpoint_that_lacks_a_process_is_refused(played: Played, tmp_path: Path) -> None:
    folder = tmp_path / "3"
    shutil.copytree(played[0] / "saved" / "3", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["model-00001-of-00002.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="elements 0 to 24 of experts are not all there"):
        weights(folder)


@pytest.mark.parametrize(
    ("scene", "failing"),
    [("rank 1 cannot write", 1), ("rank 0 cannot write", 0), ("rank 0 cannot finish", 0)],
)
def test_a_failure_of_one_process_is_everybodys_and_leaves_nothing(
    played: Played, scene: str, failing: int
) -> None:
    root, told = played
    for rank, found in enumerate(told):
        first, second = found[scene]
        assert first == ""
        wanted = "OSError: " if rank == failing else f"CheckpointError: process {failing}: "
        assert second.count(f"{wanted}[Errno 28] No space left on device") == 2, second
    assert [path.name for path in (root / scene).iterdir()] == ["3"]  # as it was before
    verify(root / scene / "3")
    assert torch.equal(weights(root / scene / "3")["dense"], DENSE)


@pytest.mark.parametrize(("scene", "words"), [("flipped", "is damaged"), ("missing", "is missing")])
def test_what_one_process_finds_wrong_all_pass_over(played: Played, scene: str, words: str) -> None:
    root, told = played
    for found in told:
        before, after, (chosen, problem) = found[scene]
        assert before == "" and chosen == "2"
        for text in (after, problem):
            assert words in text and "model-00001-of-00002.safetensors" in text
    with pytest.raises(CheckpointError, match=words):
        verify(root / scene / "3")


def test_what_one_process_cannot_read_all_pass_over(played: Played) -> None:
    for found in played[1]:
        chosen, problem = found["unreadable"]
        assert chosen == "2" and "is not readable (Input/output error)" in problem


def test_a_process_that_does_not_see_the_folder_fails_with_the_others(played: Played) -> None:
    for found in played[1]:
        assert "nowhere" in found["unseen"] and "CheckpointError" in found["unseen"]
