"""What a run tells: a progress bar, `metrics.jsonl`, and wandb if asked for."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sra_ds.config import Recipe
from sra_ds.errors import BackendUnavailable
from sra_ds.storage.run_dir import RunDir


class RunLog:
    """Rank 0 writes; on other ranks every method does nothing."""

    def __init__(self, run: RunDir, recipe: Recipe, start_step: int, enabled: bool) -> None:
        self.enabled = enabled
        self._stream = run.metrics_file.open("a", encoding="utf-8") if enabled else None
        self._wandb = _start_wandb(run.path, recipe) if enabled else None
        self._bar = tqdm(
            total=recipe.training.steps,
            initial=start_step,
            desc=recipe.name,
            unit="step",
            disable=not enabled,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
        )

    def say(self, text: str) -> None:
        """One line for the person watching."""
        if self.enabled:
            self._bar.write(text, file=sys.stderr)

    def advance(self, shown: dict[str, str]) -> None:
        """One step done, with what the bar shows beside it."""
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def record(self, line: dict[str, Any]) -> None:
        """Append one line of metrics; it is on disk when this returns."""
        if self._stream is None:
            return
        self._stream.write(json.dumps({**line, "time": round(time.time(), 3)}) + "\n")
        self._stream.flush()
        if self._wandb is not None:
            self._wandb.log(_flat(line), step=line["step"])

    def close(self) -> None:
        """Flush and leave."""
        self._bar.close()
        if self._stream is not None:
            self._stream.close()
        if self._wandb is not None:
            self._wandb.finish()


def require_wandb(recipe: Recipe) -> None:
    """Raise `BackendUnavailable` if the recipe wants wandb and it is not installed."""
    if recipe.logging.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise BackendUnavailable(
            "logging.wandb is on but wandb is not installed; pip install 'sra_ds[logging]'"
        )


def _start_wandb(path: Path, recipe: Recipe) -> Any:
    mode = recipe.logging.wandb
    if mode == "off":
        return None
    import wandb  # optional, see require_wandb

    online = mode == "auto" and bool(os.environ.get("WANDB_API_KEY"))
    return wandb.init(
        project="sra_ds",
        name=path.name,
        dir=str(path),
        config=recipe.model_dump(mode="json"),
        mode="online" if online else "offline",
        id=path.name,
        resume="allow",
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{key}"] = value
    return flat
