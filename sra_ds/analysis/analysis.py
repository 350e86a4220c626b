"""Everything that is said about the experts of one checkpoint, from one trace of held-out text.

    trace -> words, grammar -> measures of each layer, profiles of each expert
    checkpoints -> saturation     anchors -> geometry, maps     other k, fewer experts -> sweeps

The result is plain values for `analysis.json` and the arrays the figures need.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sra_ds.analysis import anchors as anchor_space
from sra_ds.analysis.anchors import AnchorSpace
from sra_ds.analysis.layers import adjust_over_layers, label_tokens, measure_layer
from sra_ds.analysis.npmi import TOP_WORDS, WINDOW
from sra_ds.analysis.profiles import (
    Profile,
    coherence_over_untrained,
    excess,
    layer_tables,
    least_routes,
    measure_coherence,
    profile_layer,
    share_above_null,
)
from sra_ds.analysis.saturation import saturation
from sra_ds.analysis.statistics import Measured
from sra_ds.analysis.syntax import tag_words, tagger_name
from sra_ds.analysis.traces import Pass, Trace, record
from sra_ds.analysis.words import read_words
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import DataError
from sra_ds.evaluation.experts import health
from sra_ds.evaluation.sweeps import drop_curve, k_sweep
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import LoadedRun
from sra_ds.moe.routers import ScoringRouter
from sra_ds.storage.checkpoint import MANIFEST, numbered, read_manifest
from sra_ds.storage.run_dir import ANALYSIS_SCHEMA

MOST_COHERENT = 10
MAP_TOKENS = 400
"""Commonest tokens on the map of anchors and vocabulary."""


class Request(NamedTuple):
    """What to analyse: a split of the run's corpus, or files of the user's own."""

    split: str = "valid"
    files: Path | None = None
    tokens: int = 1_000_000
    batch_size: int = 16
    sweep_tokens: int = 16_384
    """For the perplexity at other k and with fewer experts; 0: leave these out."""
    plane: str = "pca"
    """How anchors and vocabulary are mapped, `pca` or `umap`."""


class AnchorMap(NamedTuple):
    """Anchors and the commonest tokens of one layer in two dimensions."""

    anchors_E2: NDArray[np.float64]
    tokens_S2: NDArray[np.float64]
    names_S: list[str]
    note: str


class Analysis(NamedTuple):
    """Of one checkpoint; `facts` is `analysis.json` less measures and experts."""

    facts: dict[str, Any]
    measures: list[dict[str, Measured]]
    geometry: list[dict[str, Measured]]
    profiles: list[list[Profile]]
    loads: list[NDArray[np.int64]]
    """Routes of each layer to its experts."""
    pairs: list[NDArray[np.int64]]
    """Tokens that two of them served together."""
    grams: list[NDArray[np.float32]]
    maps: list[AnchorMap]
    spaces: list[AnchorSpace]

    def as_dict(self) -> dict[str, Any]:
        """For `analysis.json`."""
        layers = [
            {
                "layer": layer,
                "load": self.facts["health"]["per_layer"][layer],
                "measures": {name: one.as_dict() for name, one in found.items()},
                "anchors": {
                    name: one.as_dict()
                    for name, one in (self.geometry[layer] if self.geometry else {}).items()
                },
            }
            for layer, found in enumerate(self.measures)
        ]
        experts = [profile.as_dict() for layer in self.profiles for profile in layer]
        return {**self.facts, "summary": self.summary(), "layers": layers, "experts": experts}

    def summary(self) -> dict[str, Any]:
        """The few numbers people quote, over all layers."""
        shares = [layer["coherent_share"] for layer in self.measures]
        over = [layer["coherence_over_untrained"] for layer in self.measures]
        experts = [p for layer in self.profiles for p in layer]
        tested = [p for p in experts if math.isfinite(excess(p.coherence))]
        ranked = sorted(tested, key=lambda p: -excess(p.coherence))
        kinds = ("semantic", "syntactic", "mixed", "idle")
        return {
            "coherent": _mean([share.value for share in shares]),
            "coherent_untrained": _mean([share.untrained for share in shares]),
            "coherence_over_untrained": [one.as_dict() for one in over],
            "subtoken_agreement": [m["subtoken_agreement"].as_dict() for m in self.measures],
            "most_coherent": [f"{p.layer}:{p.expert}" for p in ranked[:MOST_COHERENT]],
            "kinds": {kind: sum(p.kind == kind for p in experts) for kind in kinds},
        }


def _mean(values: list[float]) -> float | None:
    """Of what is a number; None if nothing is."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else None


def require_routed(loaded: LoadedRun) -> None:
    """Raise `DataError` for a dense model."""
    if not loaded.model.routers():
        raise DataError(f"{loaded.run.path}: the model has no routed layers; nothing to analyse")


def analyse(loaded: LoadedRun, request: Request, device: torch.device) -> Analysis:
    """Trace the text unless that was done before, and measure everything that applies. Raises
    `DataError` for a dense model."""
    require_routed(loaded)
    anchor_space.require_umap(request.plane)
    how = Pass(
        loaded.recipe.data.sequence_length,
        request.batch_size,
        end_of_text_id(loaded.tokenizer),
        request.tokens,
        device,
    )
    with open_text(loaded, request.split, request.files, request.tokens) as text:
        trace = trace_run(loaded, text.split, text.identity, how)
        settled = saturation(loaded.model, _checkpoints(loaded, trace), text.split, how)
        sweeps: dict[str, Any] = {}
        if request.sweep_tokens:
            cap = request.sweep_tokens
            sweeps["k"] = k_sweep(loaded, text.split, cap, device)
            if isinstance(loaded.model.routers()[0], ScoringRouter):  # a hash cannot go elsewhere
                sweeps["dropped"] = drop_curve(loaded, text.split, trace.load_LE, cap, device)
        label = text.label
    facts = {
        "schema_version": ANALYSIS_SCHEMA,
        "run": loaded.run.path.name,
        "recipe": loaded.recipe.name,
        "router": loaded.recipe.model.channel.router.kind,  # type: ignore[union-attr]
        "step": loaded.trainer["step"],
        "text": label,
        "tokens": trace.tokens,
        "top_k": trace.top_k,
        "domains": trace.domains,
        "methods": {
            "tagger": tagger_name(),
            "window": WINDOW,
            "top_words": TOP_WORDS,
            "least_routes": least_routes(trace),
        },
        "health": health(trace.load_LE.astype(np.float64), trace.tokens, trace.slots_L),
        "saturation": {str(step): shares for step, shares in settled.items()},
        "sweeps": sweeps,
    }
    return _measure(loaded, trace, facts, request.plane)


def trace_run(loaded: LoadedRun, split: Any, identity: dict[str, Any], how: Pass) -> Trace:
    """The trace of this checkpoint, text and length, kept under `routing/` of the run."""
    files = read_manifest(loaded.checkpoint)["files"]
    weights = sorted(e["sha256"] for name, e in files.items() if name.startswith("model"))
    top_k = loaded.model.routers()[0].top_k if loaded.model.routers() else 0
    whole = {
        "weights": weights, "top_k": top_k,
        "text": identity, "tokens": how.max_tokens, "length": how.length,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]
    return record(loaded.model, split, how, loaded.run.routing / f"trace-{name}", whole)


def _measure(loaded: LoadedRun, trace: Trace, facts: dict[str, Any], plane: str) -> Analysis:
    words = read_words(trace, loaded.tokenizer)
    labels = label_tokens(trace, words, tag_words(words))
    measures = [measure_layer(trace, layer, labels) for layer in range(trace.layers)]
    tables = [
        layer_tables(trace, labels, np.asarray(trace.experts_NLK[:, layer]), layer)
        for layer in range(trace.layers)
    ]
    top_words, coherences, twins = measure_coherence(trace, labels, tables)
    spaces = anchor_space.anchor_spaces(loaded.model, loaded.tokenizer.get_vocab_size())
    profiles = []
    for layer in range(trace.layers):
        named = [[words.words_W[number] for number in own] for own in top_words[layer]]
        space = spaces[layer] if spaces else None
        profiles.append(
            profile_layer(
                trace, layer, tables[layer], named, coherences[layer], space, loaded.tokenizer
            )
        )
        own_and_twins = coherences[layer], twins[layer]
        measures[layer]["coherent_share"] = share_above_null(*own_and_twins)
        measures[layer]["coherence_over_untrained"] = coherence_over_untrained(*own_and_twins)
    common = np.argsort(-np.bincount(trace.tokens_N, minlength=trace.vocab_size), kind="stable")
    common = common[common < loaded.tokenizer.get_vocab_size()][:MAP_TOKENS]
    return Analysis(
        facts,
        adjust_over_layers(measures),
        adjust_over_layers([anchor_space.geometry(space.anchors_ED) for space in spaces]),
        profiles,
        [load_E[:own] for load_E, own in zip(trace.load_LE, trace.slots_L, strict=True)],
        [
            pairs_EE[:own, :own]
            for pairs_EE, own in zip(trace.pairs_LEE, trace.slots_L, strict=True)
        ],
        [(space.anchors_ED @ space.anchors_ED.T).numpy() for space in spaces],
        [_map(space, common, loaded, plane) for space in spaces],
        spaces,
    )


def _map(space: AnchorSpace, common: NDArray[np.int64], loaded: LoadedRun, plane: str) -> AnchorMap:
    anchors_E2, tokens_S2, note = anchor_space.PLANES[plane](space, common)
    names = [loaded.tokenizer.decode([i], skip_special_tokens=False) for i in common.tolist()]
    return AnchorMap(anchors_E2, tokens_S2, names, note)


def _checkpoints(loaded: LoadedRun, trace: Trace) -> dict[int, Path]:
    """Kept checkpoints up to the analysed one, by step."""
    folder = loaded.run.checkpoints
    steps = {step: folder / str(step) for step in numbered(folder)}
    last = int(loaded.trainer["step"])
    kept = {s: path for s, path in steps.items() if s < last and (path / MANIFEST).is_file()}
    return {**kept, last: loaded.checkpoint}
