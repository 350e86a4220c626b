"""The whole path of one run, composed from the parts: resolve -> prepare -> train -> report.

This is what `launch/train.py` calls. Training knows nothing of evaluation; it is handed over here.
"""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from sra_ds.analysis.plots import draw_run
from sra_ds.config import Recipe
from sra_ds.config.data import DocstringsConfig
from sra_ds.config.model import CosineRouterConfig, MoEChannelConfig
from sra_ds.data.loader import TrainingWindows
from sra_ds.data.prepare import corpus_folder, prepare
from sra_ds.data.shards import TokenCorpus
from sra_ds.data.tokenizer import file_sha256
from sra_ds.errors import TrainingError
from sra_ds.evaluation.legacy import legacy_sra
from sra_ds.evaluation.perplexity import Setting, evaluate
from sra_ds.inference.generate import generate
from sra_ds.inference.load import LoadedRun, load_run, load_weights_into
from sra_ds.model.counting import count_parameters
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.training import checkpoint, environment
from sra_ds.training.anchors import seed_anchors
from sra_ds.training.controllers import build_controllers
from sra_ds.training.ds_config import (
    BatchPlan,
    merge_ds_config,
    plan_batches,
    read_ds_config,
    zero_stage,
)
from sra_ds.training.engine import build_engine, start_processes
from sra_ds.training.logging import require_wandb
from sra_ds.training.loop import Outcome, Trainer, Validate
from sra_ds.training.memory import estimate_bytes
from sra_ds.training.run_dir import RunDir, refuse_overwriting, write_atomically


class Resolved(NamedTuple):
    """A recipe and a DeepSpeed JSON turned into facts about this machine."""

    recipe: Recipe
    ds_config: dict[str, Any]
    batches: BatchPlan
    device: torch.device
    dtype: torch.dtype
    reasons: dict[str, str]


def resolve(recipe: Recipe, ds_path: Path) -> Resolved:
    """Settle device, precision, batch arithmetic and the DeepSpeed configuration, or say what does not
    fit together (`ConfigError`)."""
    require_wandb(recipe)
    device, device_reason = environment.choose_device()
    dtype, dtype_reason = environment.choose_precision(recipe.training.precision, device)
    batches = plan_batches(recipe, environment.world_size())
    ds_config = merge_ds_config(read_ds_config(ds_path), recipe, batches, dtype, str(ds_path))
    reasons = {"device": device_reason, "precision": dtype_reason}
    return Resolved(recipe, ds_config, batches, device, dtype, reasons)


def dry_run(resolved: Resolved, run: RunDir) -> dict[str, Any]:
    """Everything that can be known before training: parameters, data, batches, memory, disk."""
    recipe, batches = resolved.recipe, resolved.batches
    counts = count_parameters(build_model(recipe, "meta"))
    memory = estimate_bytes(
        recipe, counts["total"], batches, zero_stage(resolved.ds_config), resolved.dtype
    )
    folder = corpus_folder(recipe.data)
    data: dict[str, Any] = {"folder": str(folder), "prepared": folder.is_dir()}
    if folder.is_dir():
        corpus = TokenCorpus(folder)
        data |= {"fingerprint": corpus.fingerprint, "train_tokens": corpus.split("train").tokens}
    existing = next(p for p in (run.path, *run.path.absolute().parents) if p.exists())
    checkpoint_bytes = counts["total"] * (4 + 12)
    disk = {
        "per_checkpoint": checkpoint_bytes,
        "needed": checkpoint_bytes * (recipe.checkpoint.keep + 1) + counts["total"] * 4,
        "free": shutil.disk_usage(existing).free,
    }
    return {
        "recipe": recipe.name,
        "run": str(run.path),
        "device": f"{resolved.device} ({resolved.reasons['device']})",
        "precision": f"{resolved.dtype} ({resolved.reasons['precision']})",
        "zero_stage": zero_stage(resolved.ds_config),
        "batches": batches._asdict(),
        "tokens": recipe.training.steps * batches.batch_size * recipe.data.sequence_length,
        "parameters": {key: counts[key] for key in ("total", "active", "active_with_anchors")},
        "memory_bytes_per_process": memory,
        "disk_bytes": disk,
        "data": data,
    }


def train(
    resolved: Resolved, run: RunDir, resume: bool = False, init_from: Path | None = None
) -> dict[str, Any] | None:
    """Train one run to its end and report on it; returns the summary, or None when stopped early.

    Every failure a user can mend is an `SraError`.
    """
    try:
        return _train(resolved, run, resume, init_from)
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        remedy = _remedy(error, resolved, run)
        if remedy is None:
            raise
        raise TrainingError(remedy) from error


def _train(
    resolved: Resolved, run: RunDir, resume: bool, init_from: Path | None
) -> dict[str, Any] | None:
    recipe, batches = resolved.recipe, resolved.batches
    first = environment.rank() == 0
    if not resume and first:
        refuse_overwriting(run)
    corpus = prepare(recipe.data, progress=first)
    windows = TrainingWindows(
        corpus.split("train"),
        recipe.data.sequence_length,
        recipe.training.seed,
        corpus.end_of_text_id,
    )
    if resume:
        corpus.require_fingerprint(run.environment()["corpus_fingerprint"], str(run.path))
    model = build_model(recipe)
    if not resume:
        _start_values(model, recipe, corpus, windows, init_from)
    controllers = build_controllers(recipe, model)
    start_processes()
    if first:
        run.write_start(recipe, resolved.ds_config, _facts(resolved, corpus))
        shutil.copyfile(corpus.tokenizer_file, run.tokenizer_file)
    engine = build_engine(model, recipe, resolved.ds_config)
    peak, _ = environment.peak_flops(resolved.device, resolved.dtype)
    layout = checkpoint.Layout(batches.world_size, zero_stage(resolved.ds_config))
    trainer = Trainer(
        recipe, run, engine, windows, batches, layout, controllers,
        _validator(recipe, corpus, run, resolved.device), peak,
    )  # fmt: skip
    if resume:
        folder, manifest, problems = checkpoint.newest_complete(run.checkpoints)
        for problem in problems if first else []:
            _say(f"passing over a broken checkpoint: {problem}")
        checkpoint.require_layout(manifest, layout, folder)
        trainer.restore(checkpoint.load_engine(engine, folder))
        if first:
            run.drop_metrics_after(trainer.step)
            _say(f"resuming {run.path} at step {trainer.step}")
    outcome = trainer.run()
    if outcome.stopped_by is not None:
        if first:
            _say(
                f"stopped by {outcome.stopped_by} after step {outcome.step}; everything is saved: "
                f"go on with --resume --run {run.path}"
            )
        return None
    return report(run, resolved, outcome) if first else None


def _start_values(
    model: LanguageModel,
    recipe: Recipe,
    corpus: TokenCorpus,
    windows: TrainingWindows,
    init_from: Path | None,
) -> None:
    """Weights of another run, or anchors from the first batch where the recipe says so."""
    if init_from is not None:
        source = load_run(init_from)
        corpus.require_tokenizer(file_sha256(source.run.tokenizer_file), str(init_from))
        load_weights_into(model, source.checkpoint)
    elif _anchors_from_data(recipe):
        seed_anchors(model, windows.batch(0, recipe.training.batch_size), recipe.training.seed)


def report(run: RunDir, resolved: Resolved, outcome: Outcome) -> dict[str, Any]:
    """Figures, samples and `summary.json` of a finished run, from its files."""
    loaded = load_run(run.path, "latest", resolved.device)
    recipe = resolved.recipe
    validation = dict(outcome.validation or {})
    validation["legacy_sra_perplexity"] = None
    if recipe.evaluation.legacy_sra:
        legacy = score_legacy(loaded, "valid", resolved.device)
        validation["legacy_sra_perplexity"] = None if legacy is None else legacy["perplexity"]
        write_atomically(run.evaluation / "legacy_sra.json", json.dumps(legacy, indent=1))
    draw_figures(loaded, run)
    samples = write_samples(loaded, run)
    tokens = outcome.step * resolved.batches.batch_size * recipe.data.sequence_length
    counts = count_parameters(loaded.model)
    summary = {
        "recipe": recipe.name,
        "run": str(run.path),
        "steps": outcome.step,
        "tokens": tokens,
        "seconds": outcome.seconds,
        "tokens_per_second": tokens / max(outcome.seconds, 1e-9),
        "params": {"total": counts["total"], "active": counts["active"]},
        "validation": validation,
        "experts": outcome.experts,
        "best": outcome.best,
        "device": f"{resolved.device} ({resolved.reasons['device']})",
        "kernel": "torch grouped_mm" if loaded.model.routers() else "torch mm",
        "corpus_fingerprint": run.environment()["corpus_fingerprint"],
        "samples": samples,
    }
    write_atomically(run.summary_file, json.dumps(summary, indent=1))
    return summary


def score_legacy(loaded: LoadedRun, split: str, device: torch.device) -> dict[str, Any] | None:
    """The published PAD-counting protocol on a split of the run's corpus."""
    corpus = prepare(loaded.recipe.data, progress=False)
    blank_line = isinstance(loaded.recipe.data, DocstringsConfig)
    return legacy_sra(loaded.model, corpus.split(split), loaded.tokenizer, blank_line, device)


def draw_figures(loaded: LoadedRun, run: RunDir) -> list[Path]:
    """Redraw the run's figures from its files."""
    snapshots = sorted(run.routing.glob("*.safetensors"), key=lambda path: int(path.stem))
    load_LE = load_file(snapshots[-1])["load_LE"].numpy() if snapshots else np.zeros((0, 0))
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(loaded.model.parameters()).device)
    with torch.no_grad():
        grams = [gram.float().cpu().numpy() for gram in loaded.model(ids).anchor_grams]
    return draw_run(run.metrics(), load_LE, grams, run.figures)


def write_samples(loaded: LoadedRun, run: RunDir) -> dict[str, str]:
    """Continue the recipe's prompts and keep the texts."""
    logging = loaded.recipe.logging
    samples = {
        prompt: "".join(generate(loaded.model, loaded.tokenizer, prompt, logging.sample_tokens))
        for prompt in logging.prompts
    }
    text = "\n\n".join(f">>> {prompt}\n{prompt}{rest}" for prompt, rest in samples.items())
    write_atomically(run.samples_file, text + "\n")
    return samples


def _validator(recipe: Recipe, corpus: TokenCorpus, run: RunDir, device: torch.device) -> Validate:
    """Scores the validation split; the whole one also document by document, kept for comparisons."""
    split = corpus.split("valid")
    length, stride = recipe.data.sequence_length, recipe.evaluation.stride
    setting = Setting(
        length, stride or length, recipe.evaluation.batch_size, corpus.end_of_text_id, device
    )

    def validate(
        engine: Any, max_tokens: int, stopped: Callable[[], bool]
    ) -> dict[str, Any] | None:
        first = engine.global_rank == 0
        result = evaluate(engine, split, setting, max_tokens, first, stopped)
        if result is None:
            return None
        if first and not max_tokens:
            np.savez(
                run.evaluation / "valid_documents.npz",
                nll=result.document_nll,
                tokens=result.document_tokens,
            )
        return result.summary()

    return validate


def _anchors_from_data(recipe: Recipe) -> bool:
    channel = recipe.model.channel
    return (
        isinstance(channel, MoEChannelConfig)
        and isinstance(channel.router, CosineRouterConfig)
        and channel.router.anchors == "data"
    )


def _facts(resolved: Resolved, corpus: TokenCorpus) -> dict[str, Any]:
    return {
        "device": str(resolved.device),
        "precision": str(resolved.dtype),
        "reasons": resolved.reasons,
        "world_size": resolved.batches.world_size,
        "corpus": corpus.manifest["identity"],
        "corpus_fingerprint": corpus.fingerprint,
        "tokenizer_sha256": corpus.manifest["tokenizer"]["sha256"],
    }


def _remedy(error: Exception, resolved: Resolved, run: RunDir) -> str | None:
    """One line for failures that are the machine's limits; None for anything else."""
    text = str(error)
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "allocate memory" in text or "not enough memory" in text
    )
    if out_of_memory:
        micro = resolved.batches.micro_batch_size
        return (
            f"out of memory with training.micro_batch_size={micro}: try {max(1, micro // 2)}, "
            "training.activation_checkpointing=true, or ds_configs/zero2_offload.json"
        )
    if _is_disk_full(error):
        return (
            f"no space left for {run.path}; the last complete checkpoint is kept: free some space or "
            f"lower checkpoint.keep, then --resume --run {run.path}"
        )
    return None


def _is_disk_full(error: Exception) -> bool:
    """Python, safetensors and torch each say it in their own way."""
    text = str(error)
    known = ("No space left on device", "inline_container.cc")  # the second is torch.save
    return getattr(error, "errno", None) == errno.ENOSPC or any(part in text for part in known)


def _say(text: str) -> None:
    """One line for the person watching; standard output is for results."""
    tqdm.write(text, file=sys.stderr)


def finish_processes() -> None:
    """Leave the process group so that no rank waits for one that is gone."""
    if dist.is_initialized():
        dist.destroy_process_group()
