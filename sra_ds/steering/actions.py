"""The subcommands of `tools/steer.py`, their options, and the edit that each card-making one makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sra_ds.config.steering import AnyEdit, Boost, Pin, Replace, Scale, Suppress, Towards

Options = dict[str, dict[str, Any]]

MEASURE: Options = {
    "--measure-tokens": {
        "type": int, "default": 32_768,
        "help": "of validation documents, whole ones, for its cost; 0: skip",
    }
}  # fmt: skip
TRACE: Options = {
    "--text": {"type": Path, "help": "a file or folder instead of the validation split"},
    "--trace-tokens": {
        "type": int,
        "default": 200_000,
        "help": "that characterise experts; 0: all",
    },
}
WORDS: Options = {
    "--words": {
        "nargs": "+", "required": True, "metavar": "WORD", "help": "one token each, or /PATTERN/",
    },
    "--against": {"nargs": "+", "default": [], "metavar": "WORD", "help": "other words"},
    "--prompts": {"type": Path, "metavar": "FILE", "help": "one a line; default: all over the text"},
    "--tokens": {"type": int, "default": 16_384, "help": "of text, for effect and cost"},
}  # fmt: skip
LEAST = {"measure_tokens": 0, "trace_tokens": 0, "tokens": 1, "top": 0}
Values = dict[str, Any]


class Action(NamedTuple):
    """One subcommand; `edit` makes one expert's edit from the arguments."""

    help: str
    options: Options
    edit: Callable[[int, int, Values], AnyEdit] | None = None
    names_experts: bool = True

    @property
    def makes_card(self) -> bool:
        return self.edit is not None


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
    "attribute": Action(
        "which experts write words, at the end of prompts or all over neutral text",
        {
            **WORDS,
            "--text": TRACE["--text"],
            "--top": {"type": int, "default": 10, "help": "experts to print"},
            "--out": {
                "type": Path,
                "metavar": "CARD",
                "help": "scale significant experts, for more of the words",
            },
            "--divergence": {
                "type": float,
                "default": 0.005,
                "help": "at most: KL in nats per token on neutral text (default: %(default)s)",
            },
            "--lower": {"action": "store_true", "help": "a card for less of the words"},
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
            **WORDS,
            **TRACE,
        },
        names_experts=False,
    ),
}
