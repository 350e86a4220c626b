"""What a change to a model costs: its loss before and after, on the same documents."""

from pathlib import Path
from typing import Any

import torch

from sra_ds.config.steering import Steering
from sra_ds.data.shards import TokenSplit
from sra_ds.evaluation.perplexity import Perplexity, evaluate
from sra_ds.evaluation.run import Scoring, setting
from sra_ds.evaluation.text import open_corpus
from sra_ds.inference.load import LoadedRun
from sra_ds.inference.steer import steered
from sra_ds.intervals import share


def validation_split(loaded: LoadedRun) -> TokenSplit | None:
    """The validation split of the corpus a run was trained on; None where the corpus is not on this
    machine. Raises `DataError` for a damaged one."""
    folder = loaded.run.environment().get("corpus_folder")
    if folder is None or not Path(folder).is_dir():
        return None
    return open_corpus(loaded).split("valid")


def perplexity_difference(
    before: LoadedRun,
    after: LoadedRun,
    split: TokenSplit,
    max_tokens: int,
    device: torch.device,
) -> dict[str, Any]:
    """`compared` for two models of one tokenizer, over the first whole documents up to `max_tokens` (0:
    all)."""
    return compared(*(_score(one, split, max_tokens, device) for one in (before, after)))


def steering_cost(
    loaded: LoadedRun,
    steering: Steering,
    split: TokenSplit,
    max_tokens: int,
    device: torch.device,
) -> dict[str, Any]:
    """`compared` for a model as it is and as it is steered."""
    before = _score(loaded, split, max_tokens, device)
    with steered(loaded.model, steering):
        return compared(before, _score(loaded, split, max_tokens, device))


def compared(before: Perplexity, after: Perplexity) -> dict[str, Any]:
    """Token perplexities of two evaluations of the same documents, and by how many nats per token the
    second is worse, with its 95 % interval over documents."""
    was, now = before.summary(), after.summary()
    change = share(after.document_nll - before.document_nll, before.document_tokens)
    return {
        "before": was["token_perplexity"],
        "after": now["token_perplexity"],
        "difference": now["token_perplexity"] - was["token_perplexity"],
        "tokens": was["tokens"],
        "documents": len(before.document_nll),
        "worse_by_nats_per_token": change.value,
        "low": change.low,
        "high": change.high,
    }


def _score(
    loaded: LoadedRun, split: TokenSplit, max_tokens: int, device: torch.device
) -> Perplexity:
    where = setting(loaded, Scoring(), device)
    found = evaluate(loaded.model, split, where, max_tokens, progress=True)
    assert found is not None  # nobody stops it
    return found
