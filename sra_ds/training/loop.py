"""The training loop: steps, evaluations, checkpoints, and every way a run can end.

    for each step: controllers -> micro-batches (forward, losses, backward) -> optimizer -> facts
                   -> controllers -> log and alarms -> evaluate and save when due -> stop when asked

Dropout is seeded from (seed, step, micro-batch, rank), so a resumed step repeats the interrupted run's
exactly without any stored generator state.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from sra_ds.config import Recipe
from sra_ds.data.loader import Batch
from sra_ds.errors import TrainingError
from sra_ds.heap import GIVE_BACK_EVERY, give_back_freed_memory
from sra_ds.metrics import halting_summary
from sra_ds.model.facts import Halting
from sra_ds.model.flops import flops_per_token
from sra_ds.model.language_model import build_model
from sra_ds.moe.routing import Routing
from sra_ds.ops.precision import widened
from sra_ds.processes import from_all, mean_over_ranks
from sra_ds.storage import checkpoint
from sra_ds.storage.run_dir import RunDir, read_json
from sra_ds.training.controllers.protocol import Controller, Event, Seen
from sra_ds.training.controllers.schedules import current_top_k, learning_rate
from sra_ds.training.ds_config import BatchPlan
from sra_ds.training.engine import (
    ghost_learning_rates,
    plain_gradient_norm,
    set_learning_rate,
)
from sra_ds.training.engine_state import engine_state
from sra_ds.training.feed import Feed
from sra_ds.training.health import NOT_FORWARD, Health, first_non_finite
from sra_ds.training.logging import RunLog
from sra_ds.training.step import step_loss
from sra_ds.training.stop import StopRequest

Validate = Callable[[Any, int, Callable[[], bool]], dict[str, Any] | None]
"""(engine, cap on tokens, stopped) -> summary of the validation split, None if stopped."""


class StepFacts(NamedTuple):
    """Mean losses of one optimizer step over all ranks and micro-batches."""

    loss: float
    cross_entropy: float
    terms: dict[str, float]
    grad_norm: float
    seen: Seen
    haltings: list[Halting]
    """Of this rank's last micro-batch, as are the facts."""
    facts: dict[str, Tensor]


class Outcome(NamedTuple):
    """How the loop ended."""

    step: int
    tokens: int
    stopped_by: str | None
    seconds: float
    validation: dict[str, Any] | None
    best: dict[str, Any] | None
    experts: dict[str, Any] | None


class Trainer:
    """One run, from wherever it stands to its last step or to a request to stop."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        engine: Any,
        feed: Feed,
        batches: BatchPlan,
        layout: checkpoint.Layout,
        controllers: dict[str, Controller],
        validate: Validate,
        peak_flops: float,
    ) -> None:
        self.recipe, self.run_dir, self.engine = recipe, run, engine
        self.feed, self.batches, self.layout = feed, batches, layout
        self.controllers, self.validate = controllers, validate
        self.rank = engine.global_rank
        self.device = engine.device
        self.health = Health(engine.module)
        self.best: dict[str, Any] | None = None
        self.step = self.tokens = 0
        self.seconds = 0.0
        self._saved_step = -1
        self._peak = peak_flops * batches.world_size
        whole = build_model(recipe, "meta")  # the engine's may be in parts
        self._flops = cache(partial(flops_per_token, whole, recipe.data.sequence_length))

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint's trainer state; a controller that it does not know begins anew."""
        state = read_json(folder / checkpoint.TRAINER)
        self.step = self._saved_step = state["step"]
        self.tokens = state["tokens"]
        self.seconds = state["seconds"]
        if state.get("scored", scored := self._scored()) == scored:
            self.best = state["best"]
        self.health.load_state_dict(state)
        self.health.drift.load(checkpoint.open_tensors(folder, checkpoint.OPTIMIZER))
        for name, controller in self.controllers.items():
            if name in state["controllers"]:
                controller.load_state_dict(state["controllers"][name])

    def run(self) -> Outcome:
        """Train to the last step, then evaluate the whole split and save; or save and return early."""
        log = RunLog(self.run_dir, self.recipe, self.step, enabled=self.rank == 0)
        validation = None
        try:
            with StopRequest() as stop:
                while self.step < self.recipe.training.steps and not stop.agreed():
                    self._one_step(log)
                    self._when_due(log, stop)
                if not stop.agreed():
                    validation = self._evaluate(log, stop, max_tokens=0)
                self._save(log)
                finished = self.step >= self.recipe.training.steps and validation is not None
                stopped_by = None if finished else (stop.signal or "another process's signal")
        finally:
            log.close()
        experts = self.health.recent.summary()
        return Outcome(
            self.step, self.tokens, stopped_by, self.seconds, validation, self.best, experts
        )

    def _one_step(self, log: RunLog) -> None:
        training = self.recipe.training
        start = time.perf_counter()
        rate = learning_rate(
            training.schedule, training.optimizer.learning_rate, self.step, training.steps
        )
        set_learning_rate(self.engine, rate)
        for controller in self.controllers.values():
            controller.on_step_start(self.step)
        facts = self._optimize()
        events = [
            event
            for controller in self.controllers.values()
            for event in controller.on_step_end(self.step, facts.seen)
        ]
        targets = self.feed.targets(self.step)
        self.step, self.tokens = self.step + 1, self.tokens + targets
        if self.step % GIVE_BACK_EVERY == 0:
            give_back_freed_memory()
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        self._tell(log, facts, rate, targets / elapsed, events)

    def _tell(
        self,
        log: RunLog,
        facts: StepFacts,
        rate: float,
        speed: float,
        events: list[Event],
    ) -> None:
        """The finished step: its line when due, with alarms; every event; the progress bar."""
        line = {
            "step": self.step,
            "tokens": self.tokens,
            "epoch": self.feed.epoch(self.step),
            "loss": facts.loss,
            "cross_entropy": facts.cross_entropy,
            "auxiliary": facts.terms,
            "learning_rate": rate,
            "grad_norm": facts.grad_norm,
            "tokens_per_second": speed,
            "mfu": speed * self._flops(current_top_k(self.engine.module)) / self._peak,
        }
        shown = {
            "loss": f"{facts.cross_entropy:.3f}",
            "tok/s": f"{speed:,.0f}",
            "mfu": f"{line['mfu']:.0%}",
        }
        for event in events:
            self._tell_event(log, event)
        last = self.step == self.recipe.training.steps
        if self.step % self.recipe.logging.every == 0 or last:
            line["facts"] = {name: float(value) for name, value in facts.facts.items()}
            experts = self.health.facts(facts.seen.routings)
            if facts.seen.saturations:
                line["saturation"] = [float(own) for own in facts.seen.saturations]
            if ghosts := ghost_learning_rates(self.engine):
                line["ghost_learning_rates"] = ghosts
            if facts.haltings:
                line["halting"] = [halting_summary(*halting) for halting in facts.haltings]
            log.record({**line, **experts})
            for alarm in self.health.alarms(experts.get("layers", [])):
                self._tell_event(log, alarm)
        log.advance({**shown, **self.health.shown()})

    def _tell_event(self, log: RunLog, event: Event) -> None:
        log.record({"step": self.step, event.record: event._asdict()})
        log.say(f"step {self.step}: {event.line()}")

    def _optimize(self) -> StepFacts:
        """Forward and backward of every micro-batch and one optimizer step."""
        sums: dict[str, Tensor] = {}
        seen = Seen()
        output = None
        parts = self.batches.accumulation * self.batches.world_size
        targets = self.feed.targets(self.step) / parts
        for micro in range(self.batches.accumulation):
            torch.manual_seed(_seed(self.recipe.training.seed, self.step, micro, self.rank))
            batch = self._batch(micro)
            output = self.engine(*batch)
            loss, cross_entropy, terms, routings = step_loss(output, self.recipe.losses, targets)
            found = {"loss": loss, "cross_entropy": cross_entropy, **terms}
            for name, value in found.items():
                sums[name] = (
                    sums.get(name, 0.0) + widened(value.detach()) / self.batches.accumulation
                )
            means = _mean_over_ranks(sums) if micro == self.batches.accumulation - 1 else {}
            self._require_finite(means.get("loss", 0.0), "loss")
            self.engine.backward(loss)
            norm = plain_gradient_norm(self.engine)
            self.engine.step()
            if routings:
                tokens = float(routings[0].valid_count) * self.batches.world_size
                self.health.recent.add(routings, round(tokens))
            states = [own / self.batches.accumulation for own in output.memory_states_HCC]
            found_L = [own / self.batches.accumulation for own in output.saturations]
            seen = Seen(
                _add_loads(seen.routings, routings),
                _add(seen.memory_states_HCC, states),
                _add(seen.saturations, found_L),
            )
        assert output is not None
        norm = float(self.engine.get_global_grad_norm() or 0.0) if norm is None else norm
        self._require_finite(norm, "gradient norm")
        terms_only = {k: v for k, v in means.items() if k not in ("loss", "cross_entropy")}
        seen = seen._replace(
            memory_states_HCC=[mean_over_ranks(s) for s in seen.memory_states_HCC],
            saturations=[mean_over_ranks(s) for s in seen.saturations],
        )
        return StepFacts(
            means["loss"],
            means["cross_entropy"],
            terms_only,
            norm,
            seen,
            output.haltings,
            output.facts,
        )

    def _batch(self, micro: int) -> Batch:
        """This rank's part of micro-batch `micro` of the current step."""
        return self.feed.batch(self.step, micro).to(self.device)

    def _require_finite(self, value: float, what: str) -> None:
        """Stop with the name of the first part, on any rank and micro-batch, that is not finite."""
        if math.isfinite(value):
            return
        found = [
            name
            for micro in range(self.batches.accumulation)
            for name in from_all(first_non_finite(self.engine, self._batch(micro)))
        ]
        where = next((name for name in found if name != NOT_FORWARD), NOT_FORWARD)
        raise TrainingError(
            f"{what} is {value} at step {self.step + 1}, first in {where}; the checkpoints before it are "
            "kept: lower training.optimizer.learning_rate or raise training.schedule.warmup_steps, then "
            f"--resume --run {self.run_dir.path}"
        )

    def _when_due(self, log: RunLog, stop: StopRequest) -> None:
        last = self.step >= self.recipe.training.steps
        every = self.recipe.evaluation.every
        if every and self.step % every == 0 and not last and not stop.agreed():
            self._evaluate(log, stop, self.recipe.evaluation.max_tokens)
        every = self.recipe.checkpoint.every
        if every and self.step % every == 0 and not last:
            self._save(log)

    def _evaluate(self, log: RunLog, stop: StopRequest, max_tokens: int) -> dict[str, Any] | None:
        self.engine.eval()
        summary = self.validate(self.engine, max_tokens, stop.agreed)
        self.engine.train()
        if summary is None:
            return None
        epoch = self.feed.epoch(self.step)
        log.record({"step": self.step, "epoch": epoch, "validation": summary})
        log.say(
            f"step {self.step}: validation token perplexity {summary['token_perplexity']:.2f}, "
            f"accuracy {summary['accuracy']:.3f}"
        )
        self._snapshot_routing()
        watched = "capped_nll_per_token"
        if self.best is None or summary[watched] < self.best[watched]:
            self.best = {"step": self.step, **summary}
            if self.recipe.checkpoint.best:
                folder = self.run_dir.checkpoints / f"best-{self.step}"
                self._write(folder, resumable=False)
                if self.rank == 0:
                    checkpoint.point_best_at(folder)
        return summary

    def _scored(self) -> dict[str, int | None]:
        """What an evaluation's loss depends on besides the weights: `best` is of those scored alike."""
        own = self.recipe.evaluation
        return {"max_tokens": own.max_tokens, "stride": own.stride}

    def _snapshot_routing(self) -> None:
        load_LE = self.health.recent.load_LE
        if self.rank == 0 and load_LE is not None:
            path = self.run_dir.routing / f"{self.step}.safetensors"
            save_file({"load_LE": load_LE.contiguous()}, path)

    def _save(self, log: RunLog) -> None:
        if self.step == self._saved_step:
            return
        folder = self.run_dir.checkpoints / str(self.step)
        self._write(folder, resumable=True)
        self._saved_step = self.step
        if self.rank == 0:
            checkpoint.point_latest_at(folder)
            keep = self.recipe.checkpoint.keep
            checkpoint.prune(self.run_dir.checkpoints, keep, self.step)
        log.say(f"step {self.step}: saved {folder}")

    def _write(self, folder: Path, resumable: bool) -> None:
        weights, optimizer = engine_state(self.engine)
        if self.rank == 0:
            optimizer |= self.health.drift.fragments()
        tensors = {checkpoint.WEIGHTS: weights, checkpoint.OPTIMIZER: optimizer}
        if not resumable:
            del tensors[checkpoint.OPTIMIZER]
        dead = self.health.recent.dead_experts()
        facts = {"step": self.step, "tokens": self.tokens, "dead": dead}
        layers = self.engine.module.routed_layers()
        held = layers[0].backend.experts.expert_ids if layers else None
        contents = checkpoint.Contents(tensors, self._state(), facts, held)
        checkpoint.save_checkpoint(folder, contents, self.layout)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": self.best,
            "scored": self._scored(),
            **self.health.state_dict(),
            "top_k": current_top_k(self.engine.module),
            "controllers": {name: c.state_dict() for name, c in self.controllers.items()},
        }


def _seed(*parts: int) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _mean_over_ranks(sums: dict[str, Tensor]) -> dict[str, float]:
    values = mean_over_ranks(torch.stack([value.reshape(()) for value in sums.values()]))
    return dict(zip(sums, values.tolist(), strict=True))


def _add(total: Sequence[Tensor], new: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(total, new, strict=True)] if total else new


def _add_loads(total: Sequence[Routing], new: list[Routing]) -> list[Routing]:
    """Routing of a whole step: the newest micro-batch's, with the loads of all."""
    if not total:
        return [_detached(routing, routing.load_E) for routing in new]
    return [_detached(b, a.load_E + b.load_E) for a, b in zip(total, new, strict=True)]


def _detached(routing: Routing, load_E: Tensor) -> Routing:
    return routing._replace(load_E=load_E.detach(), mean_probs_E=routing.mean_probs_E.detach())
