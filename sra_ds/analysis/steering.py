"""What `tools/steer.py` does: cards made and priced, experts detected, steering and cards verified."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from sra_ds.analysis.analysis import trace_run
from sra_ds.analysis.detect import detect, read_texts
from sra_ds.analysis.effect import (
    WordSets,
    effect,
    neutral_batches,
    prompt_batches,
    word_tokens,
)
from sra_ds.analysis.traces import Pass, Trace
from sra_ds.analysis.verify import choose_targets, verify
from sra_ds.config.steering import (
    AnyEdit,
    Boost,
    Pin,
    Replace,
    Scale,
    Steering,
    Suppress,
    Towards,
)
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import ConfigError
from sra_ds.evaluation.difference import steering_cost
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import LoadedRun
from sra_ds.inference.places import Place, parse_place, require_place
from sra_ds.inference.steer import load_card, require_fit, save_card
from sra_ds.storage.run_dir import write_atomically

BATCH_SIZE = 16

MEASURE = {
    "--measure-tokens": {
        "type": int, "default": 32_768, "help": "validation tokens for its cost; 0: skip",
    }
}  # fmt: skip
TRACE = {
    "--text": {"type": Path, "help": "a file or folder instead of the validation split"},
    "--trace-tokens": {
        "type": int,
        "default": 200_000,
        "help": "that characterise experts; 0: all",
    },
}
LEAST = {"measure_tokens": 0, "trace_tokens": 0, "tokens": 1, "top": 0}
Values = dict[str, Any]


class Action(NamedTuple):
    """One subcommand; `edit` makes one expert's edit from the arguments."""

    help: str
    options: dict[str, dict[str, Any]]
    edit: Callable[[int, int, Values], AnyEdit] | None = None
    names_experts: bool = True

    @property
    def makes_card(self) -> bool:
        return self.edit is not None


def carry_out(
    loaded: LoadedRun, action: str, values: Values, device: torch.device
) -> dict[str, Any]:
    """One subcommand with its arguments by name; what it found."""
    if not loaded.model.routers():
        raise ConfigError(f"{loaded.run.path}: the model has no routed layers; nothing to steer")
    for name, least in LEAST.items():
        if values.get(name, least) < least:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} must be at least {least}, got {values[name]}")
    if action == "detect":
        return _detect(loaded, values)
    if action == "effect":
        return _effect(loaded, values, device)
    experts = [parse_place(text, action) for text in values["experts"]]
    if action == "verify":
        return _verify(loaded, experts, values, device)
    return _make_card(loaded, action, experts, values, device)


def _make_card(
    loaded: LoadedRun,
    action: str,
    experts: list[Place],
    values: Values,
    device: torch.device,
) -> dict[str, Any]:
    """Write a steering card and say what it costs."""
    if values.get("direction") == "centroid":
        trace = _trace(loaded, values, device)
        values = {**values, "centroids_LED": trace.centroids_LED}
    make = ACTIONS[action].edit
    assert make is not None
    try:
        steering = Steering(
            name=values["name"] or f"{action} {' '.join(values['experts'])}",
            made_for=f"{loaded.run.path.name}, step {loaded.trainer['step']}",
            edits=tuple(make(layer, expert, values) for layer, expert in experts),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{first['loc'][-1]}: {first['msg']}, got {first['input']}") from None
    require_fit(loaded.model, steering)
    found: dict[str, Any] = {"card": str(values["out"]), "name": steering.name}
    if values["measure_tokens"]:
        with open_text(loaded) as text:
            tokens = values["measure_tokens"]
            found["cost"] = steering_cost(loaded, steering, text.split, tokens, device)
    save_card(steering, values["out"])
    return found


def _detect(loaded: LoadedRun, values: Values) -> dict[str, Any]:
    sets = [read_texts(values[name]) for name in ("with_it", "without")]
    rows = detect(loaded, *sets)
    return {"texts": [len(texts) for texts in sets], "top": values["top"], "experts": rows}


def _verify(
    loaded: LoadedRun, experts: list[Place], values: Values, device: torch.device
) -> dict[str, Any]:
    for place in experts:
        require_place(loaded.recipe, place, f"verify {place}")
    trace = _trace(loaded, values, device)
    targets = choose_targets(trace, experts)
    with open_text(loaded, files=values["text"], max_tokens=values["tokens"]) as text:
        rows = verify(loaded, trace, text.split, targets, values["tokens"])
    result = {"run": loaded.run.path.name, "tokens": values["tokens"], "verified": rows}
    if values["out"] is not None:
        write_atomically(values["out"], json.dumps(result, indent=1))
    return result


def _effect(loaded: LoadedRun, values: Values, device: torch.device) -> dict[str, Any]:
    steering = load_card(values["card"])
    require_fit(loaded.model, steering)
    words = WordSets(*(word_tokens(loaded.tokenizer, values[n]) for n in ("words", "against")))
    both = sorted(set(words.own_S) & set(words.others_S))
    if both:
        raise ConfigError(f"{loaded.tokenizer.decode(both)!r} is in --words and in --against")
    trace = _trace(loaded, values, device)
    with open_text(loaded, files=values["text"], max_tokens=values["tokens"]) as text:
        if values["prompts"] is None:
            batches = neutral_batches(loaded, text.split, values["tokens"])
        else:
            batches = prompt_batches(loaded, read_texts(values["prompts"]))
        found = effect(loaded, steering, batches, words, trace)
        cost = steering_cost(loaded, steering, text.split, values["tokens"], device)
    return {
        "name": steering.name,
        "units": sum(len(batch.ids_BT) for batch in batches),
        "effect": {name: one.as_dict() for name, one in found.items()},
        "cost": cost,
    }


def _trace(loaded: LoadedRun, values: Values, device: torch.device) -> Trace:
    how = Pass(
        loaded.recipe.data.sequence_length,
        BATCH_SIZE,
        end_of_text_id(loaded.tokenizer),
        values["trace_tokens"],
        device,
    )
    with open_text(loaded, files=values["text"], max_tokens=how.max_tokens) as text:
        return trace_run(loaded, text.split, text.identity, how)


def _towards(layer: int, expert: int, values: Values) -> Towards:
    direction: Any = "anchor"
    if values["direction"] == "centroid":
        direction = tuple(values["centroids_LED"][layer, expert].tolist())
    return Towards(layer=layer, expert=expert, strength=values["strength"], direction=direction)


ACTIONS = {
    "suppress": Action(
        "no token may choose these experts", MEASURE, lambda l, e, v: Suppress(layer=l, expert=e)
    ),
    "boost": Action(
        "raise their scores",
        {"--by": {"type": float, "required": True, "help": "in units of scores"}, **MEASURE},
        lambda l, e, v: Boost(layer=l, expert=e, by=v["by"]),
    ),
    "scale": Action(
        "multiply their gates",
        {
            "--by": {"type": float, "required": True, "help": "0: silent, 1: as it is"},
            "--renormalise": {"action": "store_true", "help": "keep the sum of a token's gates"},
            **MEASURE,
        },
        lambda l, e, v: Scale(layer=l, expert=e, by=v["by"], renormalise=v["renormalise"]),
    ),
    "pin": Action("every token takes them first", MEASURE, lambda l, e, v: Pin(layer=l, expert=e)),
    "towards": Action(
        "move every token's vector towards them",
        {
            "--strength": {"type": float, "required": True, "help": "in lengths of the vector"},
            "--direction": {"choices": ("anchor", "centroid"), "default": "anchor"},
            **TRACE,
            **MEASURE,
        },
        _towards,
    ),
    "replace": Action(
        "give another output in their place",
        {"--with-expert": {"type": int, "help": "of the same layer (default: zero)"}, **MEASURE},
        lambda l, e, v: Replace(
            layer=l, expert=e, output="zero" if v["with_expert"] is None else v["with_expert"]
        ),
    ),
    "detect": Action(
        "which experts tell two sets of texts apart",
        {
            "--with": {"dest": "with_it", "type": Path, "required": True, "metavar": "FILE"},
            "--without": {"type": Path, "required": True, "metavar": "FILE"},
            "--top": {"type": int, "default": 10, "help": "experts to print"},
        },
        names_experts=False,
    ),
    "verify": Action(
        "dose and response of experts",
        {
            "--tokens": {"type": int, "default": 4096, "help": "of neutral text"},
            "--out": {"type": Path, "metavar": "JSON", "help": "also write it to a file"},
            **TRACE,
        },
    ),
    "effect": Action(
        "what a card does to words, at the end of prompts or all over neutral text",
        {
            "card": {"type": Path, "metavar": "CARD", "help": "a steering card"},
            "--words": {
                "nargs": "+",
                "required": True,
                "metavar": "WORD",
                "help": "one token each",
            },
            "--against": {"nargs": "+", "default": [], "metavar": "WORD", "help": "other words"},
            "--prompts": {"type": Path, "metavar": "FILE", "help": "one a line; default: all text"},
            "--tokens": {"type": int, "default": 16_384, "help": "of text, for effect and cost"},
            **TRACE,
        },
        names_experts=False,
    ),
}
