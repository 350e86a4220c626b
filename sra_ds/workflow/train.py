"""One run from its recipe to its report, with every failure a user can mend said in one line."""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tqdm import tqdm

from sra_ds.config import Recipe
from sra_ds.config.model import CosineRouterConfig, MoEChannelConfig
from sra_ds.data.loader import Batch, TrainingWindows
from sra_ds.data.prepare import prepare
from sra_ds.data.shards import TokenCorpus
from sra_ds.errors import DataError, TrainingError
from sra_ds.evaluation.legacy import hard_wrapped, legacy_sra
from sra_ds.evaluation.perplexity import Setting, capped_nll, evaluate
from sra_ds.files import file_sha256
from sra_ds.inference.load import load_weights_into
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.processes import from_first, together
from sra_ds.storage import checkpoint
from sra_ds.storage.run_dir import (
    RunDir,
    claim,
    open_run,
    read_json,
    refuse_overwriting,
    write_atomically,
)
from sra_ds.training import environment
from sra_ds.training.anchors import seed_anchors
from sra_ds.training.backend_choice import settle_placement
from sra_ds.training.controllers import build_controllers, build_engine_controllers
from sra_ds.training.ds_config import zero_stage
from sra_ds.training.engine import build_engine
from sra_ds.training.engine_state import restore_engine
from sra_ds.training.feed import build_feed
from sra_ds.training.loop import Trainer, Validate
from sra_ds.training.processes import start_processes
from sra_ds.training.resume import Resumed, choose_checkpoint
from sra_ds.workflow.report import report
from sra_ds.workflow.resolve import Resolved

SEED_TOKENS = 16_384
"""Tokens of a batch that anchors are taken from, whatever the layout."""


def train(
    resolved: Resolved, run: RunDir, resume: bool = False, init_from: Path | None = None
) -> dict[str, Any] | None:
    """Train one run to its end and report on it; returns the summary on rank 0, None on others and when
    stopped early.

    Every failure a user can mend is an `SraError`; a failed start or resume leaves the run as it was.
    """
    start_processes()
    run = RunDir(Path(from_first(str(run.path))))
    try:
        if environment.rank() > 0:
            return _train(resolved, run, resume, init_from)
        with claim(run):
            return _train(resolved, run, resume, init_from)
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        remedy = _remedy(error, resolved, run)
        if remedy is None:
            raise
        raise TrainingError(remedy) from error


def _train(
    resolved: Resolved, run: RunDir, resume: bool, init_from: Path | None
) -> dict[str, Any] | None:
    resolved = _settled(resolved)
    recipe, batches = resolved.recipe, resolved.batches
    first = environment.rank() == 0
    stage, size = zero_stage(resolved.ds_config), recipe.parallel.expert_parallel_size
    layout = checkpoint.Layout(batches.world_size, stage, size)
    resumed = choose_checkpoint(run, recipe) if resume else None
    if resumed is None and first:
        refuse_overwriting(run)
    elif (
        resumed is not None and resumed.step >= recipe.training.steps and run.summary_file.exists()
    ):
        _say(f"{run.path} is finished; raise training.steps to go on")
        return read_json(run.summary_file) if first else None
    share = environment.place_on_machine()
    corpus = together(lambda: prepare(recipe.data, share=share), DataError)
    assert corpus is not None
    if resumed is not None:
        corpus.require_fingerprint(run.environment()["corpus_fingerprint"], str(run.path))
    windows = TrainingWindows(
        corpus.split("train"),
        recipe.data.sequence_length,
        recipe.training.seed,
        corpus.end_of_text_id,
    )
    assert resolved.placement is not None
    model = build_model(recipe, placement=resolved.placement)
    controllers = build_controllers(recipe, model)
    if resumed is not None:
        engine = _resumed_engine(model, resolved, resumed.folder)
    else:
        engine = _new_engine(model, resolved, corpus, windows, init_from)
    controllers |= build_engine_controllers(
        recipe,
        engine,
        lambda step: _common_batch(resolved, windows, step),
        untrained=resumed is None and init_from is None,
    )
    peak, _ = environment.peak_flops(resolved.device, resolved.dtype)
    feed = build_feed(recipe, corpus, batches, environment.rank())
    trainer = Trainer(
        recipe, run, engine, feed, batches, layout, controllers,
        _validator(recipe, corpus, run, resolved.device), peak,
    )  # fmt: skip
    if resumed is not None:
        trainer.restore(resumed.folder)
    if first:
        _say(f"routing kernels: {resolved.reasons['kernels']}")
        _write_start(run, resolved, corpus, resumed)
    outcome = trainer.run()
    if outcome.stopped_by is None:
        return report(run, resolved, outcome) if first else None
    if first:
        _say(
            f"stopped by {outcome.stopped_by} after step {outcome.step}; everything is saved: "
            f"go on with --resume --run {run.path}"
        )
    return None


def _settled(resolved: Resolved) -> Resolved:
    """With the backend that `auto` stands for. Collective."""
    if resolved.placement is not None:
        return resolved
    tokens = resolved.batches.micro_batch_size * resolved.recipe.data.sequence_length
    placement, reason = settle_placement(resolved.recipe, tokens, resolved.device, resolved.dtype)
    if environment.rank() == 0:
        _say(f"backend {placement.backend} ({reason})")
    reasons = {**resolved.reasons, "backend": reason}
    return resolved._replace(placement=placement, reasons=reasons)


def _write_start(
    run: RunDir, resolved: Resolved, corpus: TokenCorpus, resumed: Resumed | None
) -> None:
    """The files that describe the run, once nothing can refuse it any more."""
    if resumed is None:
        run.metrics_file.unlink(missing_ok=True)  # of a start that saved nothing
    else:
        run.drop_metrics_after(resumed.step, resolved.recipe.training.steps)
        run.summary_file.unlink(missing_ok=True)  # of a run that had fewer steps
        for problem in resumed.problems:
            _say(f"passing over a broken checkpoint: {problem}")
        _say(f"resuming {run.path} at step {resumed.step}")
    facts = {
        "device": str(resolved.device),
        "precision": str(resolved.dtype),
        "reasons": resolved.reasons,
        "world_size": resolved.batches.world_size,
        "corpus": corpus.manifest["identity"],
        "corpus_folder": str(corpus.folder.absolute()),
        "corpus_fingerprint": corpus.fingerprint,
        "tokenizer_sha256": corpus.manifest["tokenizer"]["sha256"],
    }
    run.write_start(resolved.recipe, resolved.ds_config, facts)
    shutil.copyfile(corpus.tokenizer_file, run.tokenizer_file)


def _resumed_engine(model: LanguageModel, resolved: Resolved, folder: Path) -> Any:
    """The engine with weights and optimizer state of a checkpoint of any layout."""
    load_weights_into(model, folder)
    engine = build_engine(model, resolved.recipe, resolved.ds_config)
    weights = checkpoint.open_tensors(folder, checkpoint.WEIGHTS)
    restore_engine(engine, weights, checkpoint.open_tensors(folder, checkpoint.OPTIMIZER))
    return engine


def _new_engine(
    model: LanguageModel,
    resolved: Resolved,
    corpus: TokenCorpus,
    windows: TrainingWindows,
    init_from: Path | None,
) -> Any:
    """The engine with initial weights, or with those of another run of the same tokenizer."""
    recipe = resolved.recipe
    if init_from is not None:
        source = open_run(init_from)
        corpus.require_tokenizer(file_sha256(source.tokenizer_file), str(init_from))
        load_weights_into(model, checkpoint.choose(source.checkpoints))
    engine = build_engine(model, recipe, resolved.ds_config)
    channel = recipe.model.channel
    router = channel.router if isinstance(channel, MoEChannelConfig) else None
    seeded = isinstance(router, CosineRouterConfig) and router.anchors == "data"
    if seeded and init_from is None:
        batch = _common_batch(resolved, windows, 0)
        seed_anchors(engine.module, engine, batch, recipe.training.seed)
    return engine


def _common_batch(resolved: Resolved, windows: TrainingWindows, step: int) -> Batch:
    """The first windows of a step's batch, the same on every rank: what anchors are taken from."""
    recipe = resolved.recipe
    enough = max(1, SEED_TOKENS // recipe.data.sequence_length)
    batch = windows.batch(step, recipe.training.batch_size, slice(0, enough))
    return batch.to(resolved.device)


def _validator(recipe: Recipe, corpus: TokenCorpus, run: RunDir, device: torch.device) -> Validate:
    """Scores the validation split; the whole one also document by document, kept for comparisons."""
    split = corpus.split("valid")
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
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
        capped = capped_nll(result, split, recipe.evaluation.max_tokens)
        summary: dict[str, Any] = {**result.summary(), "capped_nll_per_token": capped}
        if recipe.evaluation.legacy_sra and not max_tokens:
            wrapped = hard_wrapped(recipe.data)
            legacy = legacy_sra(engine, split, tokenizer, wrapped, device, stopped=stopped)
            if legacy is None:
                return None
            if first:
                write_atomically(run.evaluation / "legacy_sra.json", json.dumps(legacy, indent=1))
            for name in ("perplexity", "perplexity_if_padding_were_free"):
                summary[f"legacy_sra_{name}"] = legacy.get(name)
        return summary

    return validate


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
            f"no space left for {run.path}; the last complete checkpoint, if any, is kept: free some "
            f"space or lower checkpoint.keep, then --resume --run {run.path}"
        )
    return None


def _is_disk_full(error: Exception) -> bool:
    """Python, safetensors and torch's writer each say it in their own way."""
    text = str(error)
    torch_writer = "inline_container.cc" in text and ("unexpected pos" in text or "writ" in text)
    named = "No space left on device" in text
    return getattr(error, "errno", None) == errno.ENOSPC or named or torch_writer


def _say(text: str) -> None:
    """One line for the person watching; standard output is for results."""
    tqdm.write(text, file=sys.stderr)
