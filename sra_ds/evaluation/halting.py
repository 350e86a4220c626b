"""A trained resonance model under other halting rules: what each costs in perplexity and saves in time.

Every rule scores the same text; times are taken in turns, of the whole forward pass and of the mixers in
it, as medians of the ratio to halting softly within a round.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from sra_ds.data.shards import TokenSplit
from sra_ds.evaluation.perplexity import evaluate
from sra_ds.evaluation.run import Scoring, setting
from sra_ds.inference.generate import Sampling, next_tokens
from sra_ds.inference.halting import halted_by
from sra_ds.inference.load import LoadedRun
from sra_ds.model.mixers.resonance import Resonance

ROUNDS = 5
PROMPTS, DECODED = ("The", "In", "He", "It"), 32


def halting_sweep(
    loaded: LoadedRun,
    split: TokenSplit,
    thresholds: Sequence[float],
    tokens: int,
    timed_tokens: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """One row per rule, halting softly as trained first: perplexity of the split's first `tokens` (0:
    all), iterations of a token, and speed over `timed_tokens`. Raises `ConfigError` for a model that does
    not iterate."""
    rules = ["soft", *dict.fromkeys(f"hard:{threshold:g}" for threshold in thresholds)]
    for rule in rules:
        with halted_by(loaded.model, rule):
            pass  # refuses at once what it would refuse later
    rows: list[dict[str, Any]] = []
    for rule in tqdm(rules, "rules", leave=False):
        with halted_by(loaded.model, rule):
            found = evaluate(loaded.model, split, setting(loaded, Scoring(), device), tokens)
        assert found is not None
        mean = float(found.iterations_L.mean())
        perplexity = found.summary()["token_perplexity"]
        rows.append({"rule": rule, "token_perplexity": perplexity, "iterations": mean})
    times: dict[str, list[Times]] = {rule: [] for rule in rules}
    for _ in tqdm(range(ROUNDS), "rounds", leave=False):
        for rule in rules:
            times[rule].append(time_of(loaded, split, rule, timed_tokens, device))
    for row, rule in zip(rows, rules, strict=True):
        row["perplexity_over_soft"] = row["token_perplexity"] / rows[0]["token_perplexity"]
        row["tokens_per_second"] = 1 / statistics.median(t.model for t in times[rule])
        row["decoded_tokens_per_second"] = 1 / statistics.median(t.decoding for t in times[rule])
        for part in Times._fields:
            ratios = [
                getattr(own, part) / getattr(soft, part)
                for own, soft in zip(times[rule], times["soft"], strict=True)
            ]
            row[f"{part}_time_over_soft"] = statistics.median(ratios)
    return rows


class Times(NamedTuple):
    """Seconds per token: scored by the whole forward pass, by the mixers in it, and decoded one after the
    other."""

    model: float
    mixers: float
    decoding: float


def time_of(
    loaded: LoadedRun, split: TokenSplit, rule: str, tokens: int, device: torch.device
) -> Times:
    """Of scoring the split's first tokens under a rule, and of writing some more."""
    with halted_by(loaded.model, rule), timed_mixers(loaded.model) as inside:
        start = time.perf_counter()
        found = evaluate(loaded.model, split, setting(loaded, Scoring(), device), tokens)
        seconds = time.perf_counter() - start
        assert found is not None
        mixers, start = sum(inside), time.perf_counter()
        rows = list(next_tokens(loaded.model, loaded.tokenizer, PROMPTS, DECODED, Sampling()))
        decoding = (time.perf_counter() - start) / (len(rows) * len(PROMPTS))
    return Times(seconds / found.tokens, mixers / found.tokens, decoding)


@contextmanager
def timed_mixers(model: nn.Module) -> Iterator[list[float]]:
    """Seconds of every call of a resonance mixer within the block. On a GPU these are not waited for."""
    seconds: list[float] = []
    started: list[float] = []

    def begin(*_: Any) -> None:
        started.append(time.perf_counter())

    def end(*_: Any) -> None:
        seconds.append(time.perf_counter() - started.pop())

    mixers = [module for module in model.modules() if isinstance(module, Resonance)]
    handles = [mixer.register_forward_pre_hook(begin) for mixer in mixers]
    handles += [mixer.register_forward_hook(end) for mixer in mixers]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
