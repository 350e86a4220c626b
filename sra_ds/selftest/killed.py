"""A run killed without warning and resumed ends where the undisturbed run ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sra_ds.errors import TrainingError
from sra_ds.storage.run_dir import RunDir
from sra_ds.training.environment import free_port

WORDS, DOCUMENTS = 150, 120
SAVED_EVERY, SAVES_PER_KILL, FEWEST_STEPS = 2, 4, 30
RECIPE = (
    "data.source=text", "data.sequence_length=32", "data.tokenizer.vocab_size=512",
    "data.held_out=0.1", "model.width=32", "model.layers=2", "model.mixer.heads=2",
    "model.channel.experts=8", "model.channel.expert.hidden=32",
    "training.batch_size=8", "training.precision=fp32", "evaluation.every=0",
    "evaluation.legacy_sra=false", f"checkpoint.every={SAVED_EVERY}", "checkpoint.keep=2",
    "checkpoint.best=false", "logging.every=1", "logging.sample_tokens=0",
)  # fmt: skip


def kill_and_resume(
    script: Path, ds_config: Path, world: int, folder: Path, kills: int
) -> dict[str, Any]:
    """Train undisturbed, then once more with `kills` SIGKILLs of all processes at random moments of
    training and saving, experts spread over all processes; compare the losses of every step.

    Raises `TrainingError` if a resumed run cannot go on, ends by itself or ends elsewhere.
    """
    steps = max(FEWEST_STEPS, 4 * SAVED_EVERY * SAVES_PER_KILL * kills)
    text = _write_text(folder / "text.jsonl")
    data = [f"data.train=[{text}]", f"data.directory={folder / 'data'}"]
    if world > 1:
        data += [f"parallel.expert_parallel_size={world}", "model.channel.backend=deepspeed"]
    command = [str(script), "--deepspeed", str(ds_config)]
    undisturbed, killed = RunDir(folder / "undisturbed"), RunDir(folder / "killed")
    fresh = [*command, "--recipe", "quickstart", *RECIPE, *data, f"training.steps={steps}"]
    _finish(world, [*fresh, "--run", str(undisturbed.path)])
    moments, resumed_at = random.Random(0), []
    for number in tqdm(range(kills), "kills"):
        start = [*fresh, "--run", str(killed.path)]
        if number:
            start = [*command, "--resume", "--run", str(killed.path)]
        resumed_at.append(_kill_after_checkpoint(world, start, killed, moments))
    _finish(world, [*command, "--resume", "--run", str(killed.path)])
    losses = [_losses(run) for run in (undisturbed, killed)]
    if losses[0].keys() != losses[1].keys():
        raise TrainingError(f"{killed.path} did other steps than {undisturbed.path}")
    worst = max(abs(losses[0][step] - losses[1][step]) for step in losses[0])
    return {"kills": kills, "killed_after_step": resumed_at, "loss_difference": worst}


def _kill_after_checkpoint(
    world: int, command: list[str], run: RunDir, moments: random.Random
) -> int:
    """Start, wait for some checkpoints more, kill within the time of about one; the step of the newest
    checkpoint then."""
    wanted = _newest(run) + SAVED_EVERY * moments.randint(1, SAVES_PER_KILL)
    process = _start(world, command)
    started = seen = time.monotonic()
    step, between = _newest(run), 0.0
    while step < wanted:
        _require_alive(process, command)
        if time.monotonic() - started > 300:
            raise TrainingError(f"{run.path}: no checkpoint of step {wanted} within 300 s")
        time.sleep(0.002)
        if _newest(run) > step:
            step, between, seen = _newest(run), time.monotonic() - seen, time.monotonic()
    time.sleep(moments.uniform(0.0, min(between, 0.5)))
    _require_alive(process, command)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return _newest(run)


def _require_alive(process: "subprocess.Popen[str]", command: list[str]) -> None:
    if process.poll() is not None:
        _, errors = process.communicate()
        last = (errors or "").strip().splitlines()[-1:]
        raise TrainingError(
            f"{' '.join(command)} ended with {process.returncode} before it was killed: {last}"
        )


def _finish(world: int, command: list[str]) -> None:
    process = _start(world, command)
    _, errors = process.communicate()
    if process.returncode:
        last = (errors or "").strip().splitlines()[-1:]
        raise TrainingError(f"{' '.join(command)} ended with {process.returncode}: {last}")


def _start(world: int, command: list[str]) -> "subprocess.Popen[str]":
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={world}"]
        launcher += [f"--master_port={free_port()}", "--"]  # or torchrun takes --run for its own
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    return subprocess.Popen(
        [*launcher, *command], env=clean, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def _newest(run: RunDir) -> int:
    """Step that `latest` names, 0 before there is one."""
    latest = run.checkpoints / "latest"
    return int(latest.read_text("utf-8")) if latest.is_file() else 0


def _losses(run: RunDir) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in run.metrics() if "loss" in line}


def _write_text(path: Path) -> Path:
    """Sentences in which each word decides the next but for a coin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(WORDS)]
    lines = []
    for _ in range(DOCUMENTS):
        at, text = rng.randrange(WORDS), []
        for _ in range(90):
            text.append(words[at])
            at = (7 * at + rng.choice((1, 3))) % WORDS
        lines.append(json.dumps({"text": " ".join(text)}))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path
