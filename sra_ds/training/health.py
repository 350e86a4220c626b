"""Watching a run: load over the last million tokens, and where a non-finite number came from."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sra_ds.data.loader import Batch
from sra_ds.metrics import DEAD_SHARE, layers_summary
from sra_ds.model.language_model import ModelOutput
from sra_ds.moe.routing import Routing

WINDOW_TOKENS = 1_000_000
BUCKETS = 32
NOT_FORWARD = "the gradient (the forward pass is finite)"


class RecentLoad:
    """Routes per layer and expert over the newest steps that hold at least a million tokens, kept in
    about 32 buckets, so that a checkpoint can carry them."""

    def __init__(self, window_tokens: int = WINDOW_TOKENS) -> None:
        self.window_tokens = window_tokens
        self.tokens = 0
        self.load_LE: Tensor | None = None
        self._buckets: deque[tuple[int, Tensor]] = deque()

    def add(self, routings: Sequence[Routing], tokens: int) -> None:
        """One micro-batch of `tokens` valid tokens over all ranks."""
        if not routings:
            return
        load_LE = torch.stack([r.load_E for r in routings]).detach().double().cpu()
        if self._buckets and self._buckets[-1][0] + tokens <= self.window_tokens // BUCKETS:
            last_tokens, last_LE = self._buckets.pop()
            self._buckets.append((last_tokens + tokens, last_LE + load_LE))
        else:
            self._buckets.append((tokens, load_LE))
        self.tokens += tokens
        self.load_LE = load_LE.clone() if self.load_LE is None else self.load_LE + load_LE
        while self.tokens - self._buckets[0][0] >= self.window_tokens:
            old_tokens, old_LE = self._buckets.popleft()
            self.tokens -= old_tokens
            self.load_LE = self.load_LE - old_LE

    def dead_experts(self) -> list[list[int]]:
        """Experts of each layer with fewer than 1e-4 of the window's routes."""
        if self.load_LE is None:
            return []
        dead_LE = self.load_LE < DEAD_SHARE * self.load_LE.sum(-1, keepdim=True)
        return [dead_E.nonzero().flatten().tolist() for dead_E in dead_LE]

    def state_dict(self) -> list[Any]:
        """The buckets as plain JSON values."""
        return [[tokens, load_LE.tolist()] for tokens, load_LE in self._buckets]

    def load_state_dict(self, buckets: list[Any]) -> None:
        """Take back what `state_dict` gave."""
        self._buckets.clear()
        for tokens, load in buckets:
            self._buckets.append((tokens, torch.tensor(load, dtype=torch.float64)))
        self.tokens = sum(tokens for tokens, _ in self._buckets)
        if self._buckets:
            self.load_LE = torch.stack([load_LE for _, load_LE in self._buckets]).sum(0)

    def summary(self) -> dict[str, Any] | None:
        """Health of every layer; `dead_fraction` is over all layers at the stricter definition (fewer
        than 1e-4 of the routes). None for a dense model."""
        if self.load_LE is None:
            return None
        found = layers_summary(self.load_LE, self.tokens)
        return {"window_tokens": self.tokens, "dead": found["dead_by_routes"], **found}


def first_non_finite(engine: Any, batch: Batch) -> str:
    """Name of the first part whose output is not finite on this batch; `NOT_FORWARD` if all are."""
    found: list[str] = []
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                found.append(name)

        return hook

    parts = [("embedding", engine.module.embedding)]
    for number, block in enumerate(engine.module.blocks):
        parts += [
            (f"layer {number} mixer", block.mixer),
            (f"layer {number} channel", block.channel),
        ]
    parts.append(("final norm", engine.module.final_norm))
    for name, module in parts:
        handles.append(module.register_forward_hook(watch(name)))
    with torch.no_grad():
        output: ModelOutput = engine(*batch)
    for handle in handles:
        handle.remove()
    if found:
        return found[0]
    if output.loss_sum is not None and not torch.isfinite(output.loss_sum):
        return "head"
    return NOT_FORWARD
