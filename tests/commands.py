"""A tiny corpus and recipe, and the real commands run on them."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "launch" / "train.py"
BIN = Path(sys.executable).parent

RECIPE = {
    "name": "tiny",
    "data": {
        "source": "text",
        "held_out": 0.1,
        "sequence_length": 32,
        "tokenizer": {"vocab_size": 512},
    },
    "model": {
        "width": 32,
        "layers": 2,
        "embedding": {"dropout": 0.0},
        "mixer": {"heads": 2, "dropout": 0.0},
        "channel": {
            "kind": "moe",
            "experts": 8,
            "top_k": 2,
            "expert": {"hidden": 32, "dropout": 0.0},
        },
    },
    "losses": {
        "balance": {"kind": "cv2", "weight": 0.1},
        "dispersion": {"kind": "squared", "weight": 0.1},
        "z_weight": 0.001,
    },
    "training": {
        "steps": 12,
        "batch_size": 8,
        "optimizer": {"learning_rate": 0.003},
        "schedule": {"warmup_steps": 4},
    },
    "evaluation": {"every": 5, "batch_size": 8},
    "checkpoint": {"every": 4, "keep": 9},
    "logging": {"every": 1, "sample_tokens": 5},
}


def write_corpus(path: Path, documents: int = 120) -> Path:
    """Text with a structure a tiny model can learn: each word decides the next but for a coin."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(120)]
    lines = []
    for number in range(documents):
        at = rng.randrange(len(words))
        text = []
        for _ in range(90):
            text.append(words[at])
            at = (7 * at + rng.choice((1, 3))) % len(words)
        lines.append(json.dumps({"text": " ".join(text) + ".", "domain": f"d{number % 2}"}))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def write_recipe(folder: Path, corpus: Path) -> Path:
    """The tiny recipe as a file, with its prepared data beside it."""
    recipe = json.loads(json.dumps(RECIPE))
    recipe["data"] |= {"train": [str(corpus)], "directory": str(folder / "data")}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
    return path


def environment() -> dict[str, str]:
    """The environment of a user who calls the virtual environment's programs."""
    unwanted = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "SRA_RUN_STAMP"}
    kept = {key: value for key, value in os.environ.items() if key not in unwanted}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{kept.get('PATH', '')}"}


def call(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and keep what it printed."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def train(*arguments: object, stage: int = 0, cwd: Path | None = None):
    """launch/train.py with plain python."""
    config = ROOT / "ds_configs" / f"zero{stage}.json"
    return call(sys.executable, TRAIN, "--deepspeed", config, *arguments, cwd=cwd)


def launch(processes: int, *arguments: object, stage: int = 0, cwd: Path | None = None):
    """launch/train.py with the DeepSpeed launcher."""
    config = ROOT / "ds_configs" / f"zero{stage}.json"
    return call(
        BIN / "deepspeed",
        "--master_port",
        _free_port(),
        "--num_gpus",
        processes,
        TRAIN,
        "--deepspeed",
        config,
        *arguments,
        cwd=cwd,
    )


def step_lines(run: Path) -> list[dict]:
    """The lines of training steps in a run's metrics."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line for line in lines if "loss" in line]


def losses(run: Path) -> list[float]:
    """Total loss of each step."""
    return [line["loss"] for line in step_lines(run)]


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def interrupt(whole: Path, run: Path, at: int, end: int) -> None:
    """A copy of a finished run as it stood at the checkpoint before the last."""
    shutil.copytree(whole, run, symlinks=True)
    shutil.rmtree(run / "checkpoints" / str(end))
    (run / "checkpoints" / "best").unlink()
    (run / "summary.json").unlink()
    (run / "checkpoints" / "latest").write_text(str(at))
