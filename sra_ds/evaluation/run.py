"""Everything `tools/evaluate.py` says about a trained run."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from sra_ds.config.data import CorpusConfig
from sra_ds.data.loader import TrainingWindows
from sra_ds.data.shards import TokenCorpus, TokenSplit
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import ConfigError
from sra_ds.evaluation.dynamic import evaluate_dynamically, require_persistent_memory
from sra_ds.evaluation.experts import health, load_over_tokens
from sra_ds.evaluation.legacy import hard_wrapped, legacy_sra
from sra_ds.evaluation.perplexity import Perplexity, Setting, evaluate
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import LoadedRun

USUAL = {
    "stride": 0, "batch_size": 16, "legacy_sra": False, "health_tokens": 1_000_000, "dynamic": False,
}  # fmt: skip
"""What `tools/evaluate.py` asks for unless told otherwise."""


class Scoring(NamedTuple):
    """What to score and how; `stride` 0 means windows without overlap."""

    split: str = "valid"
    text: Path | None = None
    stride: int = 0
    batch_size: int = 16
    health_tokens: int = 0
    legacy: bool = False
    dynamic: bool = False
    """Also with a persistent memory that goes on being written."""


def score_run(loaded: LoadedRun, scoring: Scoring, device: torch.device) -> dict[str, Any]:
    """Perplexity of a split or of the user's text, expert health and, if asked for, the legacy figure."""
    head = {"run": str(loaded.run.path), "checkpoint": loaded.checkpoint.name}
    named = {"split": scoring.split} if scoring.text is None else {"text": str(scoring.text)}
    with open_text(loaded, scoring.split, scoring.text) as text:
        return {**head, **named, **_score(loaded, text.split, scoring, device, text.corpus)}


def _score(
    loaded: LoadedRun,
    split: TokenSplit,
    scoring: Scoring,
    device: torch.device,
    corpus: TokenCorpus | None,
) -> dict[str, Any]:
    if scoring.dynamic:
        require_persistent_memory(loaded.model)
    result = evaluate(loaded.model, split, setting(loaded, scoring, device), progress=True)
    assert result is not None
    report: dict[str, Any] = dict(result.summary())
    if result.iterations_L.size:
        mean = float(result.iterations_L.mean())
        report["iterations"] = {"mean": mean, "by_layer": result.iterations_L.tolist()}
    if scoring.dynamic:
        dynamic = evaluate_dynamically(
            loaded.model, split, setting(loaded, scoring, device), progress=True
        )
        report["dynamic_evaluation"] = dynamic.summary()
    if loaded.model.routers() and scoring.health_tokens:
        report["experts"] = _health(loaded, result, scoring, device, corpus)
    if scoring.legacy:
        wrapped = hard_wrapped(loaded.recipe.data)
        report["legacy_sra"] = legacy_sra(
            loaded.model, split, loaded.tokenizer, wrapped, device, progress=True
        )
    return report


def setting(loaded: LoadedRun, scoring: Scoring, device: torch.device) -> Setting:
    """Window geometry for this run's model; raises `ConfigError` for a stride beyond the window."""
    data: CorpusConfig = loaded.recipe.data
    if scoring.stride > data.sequence_length:
        raise ConfigError(f"--stride {scoring.stride} exceeds the window of {data.sequence_length}")
    stride = scoring.stride or data.sequence_length
    end = end_of_text_id(loaded.tokenizer)
    return Setting(data.sequence_length, stride, scoring.batch_size, end, device)


def _health(
    loaded: LoadedRun,
    result: Perplexity,
    scoring: Scoring,
    device: torch.device,
    corpus: TokenCorpus | None,
) -> dict[str, Any]:
    load_LE = result.load_LE
    tokens = round(float(load_LE[0].sum()) / loaded.model.routers()[0].top_k)
    if corpus is not None:
        windows = TrainingWindows(
            corpus.split("train"),
            loaded.recipe.data.sequence_length,
            loaded.recipe.training.seed,
            corpus.end_of_text_id,
        )
        load_LE, tokens = load_over_tokens(
            loaded.model,
            windows,
            load_LE,
            tokens,
            scoring.health_tokens,
            scoring.batch_size,
            device,
        )
    return health(load_LE, tokens, [router.slots for router in loaded.model.routers()])
