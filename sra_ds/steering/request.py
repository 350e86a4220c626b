"""What `tools/steer.py` does: cards made and priced, experts detected, steering and cards verified."""

import json
import math
from typing import Any

import torch
from pydantic import ValidationError

from sra_ds.analysis.analysis import trace_run
from sra_ds.analysis.statistics import SIGNIFICANT
from sra_ds.analysis.traces import Pass, Trace
from sra_ds.config.steering import Steering
from sra_ds.data.loader import Batch
from sra_ds.data.shards import TokenSplit
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import ConfigError
from sra_ds.evaluation.difference import steering_cost
from sra_ds.evaluation.text import open_text
from sra_ds.files import file_sha256
from sra_ds.inference.load import LoadedRun
from sra_ds.inference.places import Place, parse_place, require_place
from sra_ds.inference.steer import (
    made_for,
    open_card,
    require_card,
    require_fit,
    save_card,
    text_mark,
)
from sra_ds.steering.actions import ACTIONS, LEAST, Values
from sra_ds.steering.attribution import attribute, gate_cost, gate_slopes
from sra_ds.steering.detect import detect, read_texts
from sra_ds.steering.effect import (
    WordSets,
    divergence,
    effect,
    neutral_batches,
    prompt_batches,
    word_tokens,
)
from sra_ds.steering.fit import Fit, Walk
from sra_ds.steering.verify import choose_targets, verify
from sra_ds.storage.run_dir import require_file, write_atomically

BATCH_SIZE = 16


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
    _require_out(action, values)
    if action == "detect":
        return _detect(loaded, values)
    if action == "attribute":
        return _attribute(loaded, values)
    if action == "effect":
        return _effect(loaded, values, device)
    experts = [parse_place(text, action) for text in values["experts"]]
    if action == "verify":
        return _verify(loaded, experts, values, device)
    return _make_card(loaded, action, experts, values, device)


def _require_out(action: str, values: Values) -> None:
    """Refuse before the work what could not be written after it."""
    if values.get("out") is not None:
        (require_file if action == "verify" else require_card)(values["out"])
    elif values.get("lower"):
        raise ConfigError("--lower has an effect only with --out; leave it out")


def _make_card(
    loaded: LoadedRun,
    action: str,
    experts: list[Place],
    values: Values,
    device: torch.device,
) -> dict[str, Any]:
    """Write a steering card and say what it costs."""
    if values.get("direction") == "centroid":
        _require_experts(loaded, action, experts)
        trace = _trace(loaded, values, device)
        values = {**values, "centroids_LED": trace.centroids_LED}
    make = ACTIONS[action].edit
    assert make is not None
    try:
        steering = Steering(
            name=values["name"] or f"{action} {' '.join(values['experts'])}",
            made_for=made_for(loaded),
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


def _require_experts(loaded: LoadedRun, action: str, experts: list[Place]) -> None:
    """Raise `ConfigError` for one that nothing can be traced of."""
    slots_L = [router.slots for router in loaded.model.routers()]
    for place in experts:
        require_place(slots_L, place, f"{action} {place}")


def _detect(loaded: LoadedRun, values: Values) -> dict[str, Any]:
    sets = [read_texts(values[name]) for name in ("with_it", "without")]
    rows = detect(loaded, *sets)
    return {"texts": [len(texts) for texts in sets], "top": values["top"], "experts": rows}


def _verify(
    loaded: LoadedRun, experts: list[Place], values: Values, device: torch.device
) -> dict[str, Any]:
    _require_experts(loaded, "verify", experts)
    trace = _trace(loaded, values, device)
    targets = choose_targets(trace, experts)
    with open_text(loaded, files=values["text"], max_tokens=values["tokens"]) as text:
        rows = verify(loaded, trace, text.split, targets, values["tokens"])
    result = {"run": loaded.run.path.name, "tokens": values["tokens"], "verified": rows}
    if values["out"] is not None:
        write_atomically(values["out"], json.dumps(result, indent=1))
    return result


def _attribute(loaded: LoadedRun, values: Values) -> dict[str, Any]:
    words = _words(loaded, values)
    if not 0 < values["divergence"] < math.inf:
        raise ConfigError(f"--divergence must be above 0, got {values['divergence']}")
    with open_text(loaded, files=values["text"], max_tokens=values["tokens"]) as text:
        places = _places(loaded, values, text.split)
        slopes_BLE = gate_slopes(loaded.model, places, words)
        neutral = neutral_batches(loaded, text.split, values["tokens"])
        rows = attribute(slopes_BLE, gate_cost(loaded.model, neutral))
        result: dict[str, Any] = {"units": len(slopes_BLE), "top": values["top"], "experts": rows}
        if values["out"] is not None:
            walk = Walk(loaded.model, places, words, neutral)
            fit = walk.fit(rows, values["divergence"], values["lower"])
            result |= _save_attributed(loaded, rows, fit, values)
    return result


def _save_attributed(
    loaded: LoadedRun, rows: list[dict[str, Any]], fit: Fit, values: Values
) -> dict[str, Any]:
    if not any(row["p_adjusted"] < SIGNIFICANT for row in rows):
        raise ConfigError(
            "no expert's slope is significant, so there is nothing for a card to scale; give "
            "more --tokens, or more --prompts"
        )
    way = "less" if values["lower"] else "more"
    if not fit.edits:
        raise ConfigError(
            f"no card of the experts with significant slopes gives {way} of the words; try a "
            "smaller --divergence, or other words"
        )
    found_on = " and ".join(f"{name} ({mark})" for name, mark in _marks(loaded, values))
    steering = Steering(
        name=f"{way} {' '.join(values['words'])}",
        description=f"found on {found_on}",
        made_for=made_for(loaded),
        edits=tuple(fit.edits),
    )
    save_card(steering, values["out"])
    measured = {name: getattr(fit, name) for name in ("divergence", "before", "after")}
    return {"card": str(values["out"]), "scaled": len(fit.edits), **measured}


def _effect(loaded: LoadedRun, values: Values, device: torch.device) -> dict[str, Any]:
    measured = [mark for _, mark in _marks(loaded, values)]
    steering = open_card(loaded, values["card"], measured)
    words = _words(loaded, values)
    trace = _trace(loaded, values, device)
    with open_text(loaded, files=values["text"], max_tokens=values["tokens"]) as text:
        batches = _places(loaded, values, text.split)
        found = effect(loaded, steering, batches, words, trace)
        cost = steering_cost(loaded, steering, text.split, values["tokens"], device)
        neutral = neutral_batches(loaded, text.split, values["tokens"])
        cost["divergence"] = divergence(loaded.model, steering, neutral)
    return {
        "name": steering.name,
        "units": sum(len(batch.ids_BT) for batch in batches),
        "effect": {name: one.as_dict() for name, one in found.items()},
        "cost": cost,
    }


def _words(loaded: LoadedRun, values: Values) -> WordSets:
    words = WordSets(*(word_tokens(loaded.tokenizer, values[n]) for n in ("words", "against")))
    both = sorted(set(words.own_S) & set(words.others_S))
    if both:
        raise ConfigError(f"{loaded.tokenizer.decode(both)!r} is in --words and in --against")
    return words


def _places(loaded: LoadedRun, values: Values, split: TokenSplit) -> list[Batch]:
    if values["prompts"] is None:
        return neutral_batches(loaded, split, values["tokens"])
    return prompt_batches(loaded, read_texts(values["prompts"]))


def _marks(loaded: LoadedRun, values: Values) -> list[tuple[str, str]]:
    """Name and mark of the text that is read and, if there are any, of the prompts."""
    files, prompts = values["text"], values["prompts"]
    name = "validation split" if files is None else files.name
    text = [(name, text_mark(loaded, files=files))]
    return text if prompts is None else [*text, (prompts.name, file_sha256(prompts)[:12])]


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
