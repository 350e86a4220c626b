"""Remedies: what a run does by itself for experts that get too few tokens, if its recipe asks for it.

    load over a window of tokens -> reseed_dead_anchors: fewer than 1e-4 of the routes: a new anchor
                                 -> raise_floor: less than `floor` x the mean: a larger selection bias

Windows follow each other without overlap: what is done at the end of one is judged by the whole of the
next, and nothing is done to an expert more than once a window. All is decided by the load over all
processes, the seed and the step, hence the same on each of them and after a resume.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sra_ds.config import Recipe
from sra_ds.metrics import is_dead
from sra_ds.seeds import generator
from sra_ds.training.anchors import router_inputs
from sra_ds.training.controllers.protocol import BatchOf, Event, Seen
from sra_ds.training.engine import read_parameter, write_parameter
from sra_ds.training.engine_state import forget_rows


class Intervention(NamedTuple):
    """Something a controller changed because of what it saw, and not by schedule. One list entry per
    expert."""

    kind: str
    layer: int
    experts: list[int]
    load: list[float]
    """Over the mean load, in the window that called for it."""
    before: list[float]
    """`raise_floor`: selection bias; `reseed_dead_anchors`: mean cosine of the anchor with the tokens."""
    after: list[float]

    @property
    def record(self) -> str:
        """Its key in the line of metrics."""
        return "remedy"

    def line(self) -> str:
        """For the person watching."""
        numbers = ", ".join(map(str, self.experts[:8])) + ", ..." * (len(self.experts) > 8)
        return f"remedy {self.kind} in layer {self.layer}: {len(self.experts)} experts ({numbers})"


class Remedies:
    """Controller of the anchors and the selection bias of starved experts.

    With both remedies on, a dead expert gets a new anchor and no larger bias: the anchor shows first what
    it is worth. A bias is never lowered again.
    """

    def __init__(self, recipe: Recipe, engine: Any, batch_of: BatchOf) -> None:
        self.config, self.seed = recipe.training.remedies, recipe.training.seed
        self.engine, self.routers, self.batch_of = engine, engine.module.routers(), batch_of
        self.tokens = 0.0
        self.load_LE: Tensor | None = None

    def on_step_start(self, step: int) -> None:
        del step

    def on_step_end(self, step: int, seen: Seen) -> Sequence[Event]:
        """Count the step; at the end of a window do what it calls for. Collective then."""
        load_LE = torch.stack([routing.load_E for routing in seen.routings]).cpu().double()
        self.tokens += float(load_LE[0].sum()) / seen.routings[0].expert_ids_TK.shape[1]
        load_LE = load_LE if self.load_LE is None else self.load_LE + load_LE
        if self.tokens < self.config.window_tokens:
            self.load_LE = load_LE
            return []
        self.tokens, self.load_LE = 0.0, None
        ratio_LE = load_LE / load_LE.mean(-1, keepdim=True)
        dead_LE = is_dead(load_LE)
        done = []
        if self.config.reseed_dead_anchors:
            done += self._reseed(step, dead_LE, ratio_LE)
            ratio_LE = ratio_LE.masked_fill(dead_LE, torch.inf)
        return done + self._raise_floor(ratio_LE)

    def _reseed(self, step: int, dead_LE: Tensor, ratio_LE: Tensor) -> list[Intervention]:
        """Anchors of dead experts become normalised router inputs of tokens of this step."""
        layers = [number for number, dead_E in enumerate(dead_LE) if dead_E.any()]
        if not layers:
            return []
        batch, done = self.batch_of(step), []
        inputs = router_inputs([self.routers[n] for n in layers], self.engine, batch)
        for number, tokens_ND in zip(layers, inputs, strict=True):
            order = torch.randperm(
                len(tokens_ND), generator=generator(self.seed, "reseed", step, number)
            )
            experts = dead_LE[number].nonzero().flatten()[: len(tokens_ND)].tolist()
            units_ND = normalize(tokens_ND.float(), dim=-1)
            new_RD = units_ND[order[: len(experts)].to(units_ND.device)]
            old_RD = self._write_anchors(number, experts, new_RD)
            before, after = (
                (normalize(rows_RD, dim=-1) @ units_ND.mean(0)).tolist()
                for rows_RD in (old_RD, new_RD)
            )
            load = ratio_LE[number, experts].tolist()
            done.append(Intervention("reseed_dead_anchors", number, experts, load, before, after))
        return done

    def _write_anchors(self, layer: int, experts: list[int], new_RD: Tensor) -> Tensor:
        """Put the rows in the place of the anchors of these experts; what was there. Collective."""
        anchors = self.routers[layer].anchors
        anchors_ED = read_parameter(anchors)
        old_RD = anchors_ED[experts]
        anchors_ED[experts] = new_RD.to(anchors_ED.device)
        write_parameter(anchors, anchors_ED)
        forget_rows(self.engine, anchors, experts)
        return old_RD.to(new_RD.device)

    def _raise_floor(self, ratio_LE: Tensor) -> list[Intervention]:
        """The bias of every starved expert goes up by a step, as long as that stays within the cap."""
        config, done = self.config.raise_floor, []
        if config is None:
            return []
        for number, (router, ratio_E) in enumerate(zip(self.routers, ratio_LE, strict=True)):
            bias_E = router.selection_bias_E
            raised_E = (bias_E + config.step).clamp(max=config.cap)
            starved_E = (ratio_E < config.floor).to(bias_E.device) & (raised_E > bias_E)
            experts = starved_E.nonzero().flatten().tolist()
            if experts:
                before, after = bias_E[experts].tolist(), raised_E[experts].tolist()
                bias_E[experts] = raised_E[experts]
                load = ratio_E[experts].tolist()
                done.append(Intervention("raise_floor", number, experts, load, before, after))
        return done

    def state_dict(self) -> dict[str, Any]:
        load = None if self.load_LE is None else self.load_LE.tolist()
        return {"tokens": self.tokens, "load": load}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load = state["load"]
        self.tokens = state["tokens"]
        self.load_LE = None if load is None else torch.tensor(load, dtype=torch.float64)
