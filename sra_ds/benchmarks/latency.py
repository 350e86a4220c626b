"""How long a person waits: for the first token after a prompt, and for each one after it.

Models of several recipes at their initial weights, one prompt at a time with cached state, in turn in one
process. Times are medians over rounds of milliseconds; of the tokens after the first also the slowest
tenth.
"""

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sra_ds.config import Recipe
from sra_ds.heap import keep_freed_memory
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.timing import WARM_UP

PROMPT, CONTINUED = 64, 64
"""Tokens given, and tokens after them."""


def bench_latency(recipes: list[Recipe], rounds: int) -> dict[str, Any]:
    """Per recipe `first_token`, `each_token` and `slowest_tenth` in milliseconds."""
    keep_freed_memory()
    models = {recipe.name: build_model(recipe).eval() for recipe in recipes}
    times: dict[str, list[list[float]]] = {name: [] for name in models}
    for number in tqdm(range(rounds + WARM_UP), "rounds", leave=False):
        for name, model in models.items():
            found = one_text(model)
            if number >= WARM_UP:
                times[name].append(found)
    return {name: summary(found) for name, found in times.items()}


@torch.no_grad()
def one_text(model: LanguageModel) -> list[float]:
    """Milliseconds until each token of one continuation, the first after the prompt."""
    ids_BT = torch.randint(model.vocab_size, (1, PROMPT))
    state, found = model.new_state(), []
    for _ in range(1 + CONTINUED):
        start = time.perf_counter()
        logits: Tensor | None = model(ids_BT, state=state).logits
        assert logits is not None
        ids_BT = logits[:, -1:].argmax(-1)
        found.append(1e3 * (time.perf_counter() - start))
    return found


def summary(rounds: list[list[float]]) -> dict[str, float]:
    """Medians over rounds, and over the tokens after the first."""
    later = [ms for text in rounds for ms in text[1:]]
    return {
        "first_token": statistics.median(text[0] for text in rounds),
        "each_token": statistics.median(later),
        "slowest_tenth": statistics.quantiles(later, n=10)[-1],
    }
