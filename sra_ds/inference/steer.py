"""Steering without retraining: experts suppressed, boosted, pinned, scaled, replaced, or steered towards.

    x ── towards ──> router ── suppress, boost, pin ──> gates ── scale ──> experts ── replace ──> out

While a model is steered, layers with edits route and combine through functions put in front of their
own, so every router with scores, every backend and every device is steered alike, in generation and in
evaluation. A token is touched only if an edited expert is among its choices before or after; all others
keep their gates bit for bit, and edits that change nothing (factor 1, boost 0) are left out.

Letters: T tokens, D width, E experts, K experts per token.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import normalize

from sra_ds.config.steering import (
    Boost,
    Edit,
    Pin,
    Replace,
    Scale,
    Steering,
    Suppress,
    Towards,
)
from sra_ds.data.files import list_files
from sra_ds.errors import ConfigError
from sra_ds.files import file_sha256
from sra_ds.inference.load import LoadedRun
from sra_ds.model.language_model import LanguageModel
from sra_ds.moe.layer import Given, MoELayer
from sra_ds.moe.routers import ScoringRouter, anchor_rows
from sra_ds.moe.routing import Routing
from sra_ds.ops.precision import widened
from sra_ds.ops.top_k_routing import Selection, statistics, top_k_routing
from sra_ds.storage.run_dir import require_file, write_atomically

CERTAIN = 1e30
"""Added to the selection score of a pinned expert; no score comes near it."""

Kind = TypeVar("Kind", bound=Edit)


@contextmanager
def steered(model: LanguageModel, steering: Steering) -> Iterator[None]:
    """Steer a model in eval mode until the end of the block. Raises `ConfigError` for edits that do not
    fit it."""
    require_fit(model, steering)
    with ExitStack() as undo:
        for number, layer in enumerate(model.routed_layers()):
            edits = [e for e in steering.edits if e.layer == number and not _is_neutral(e)]
            _steer_layer(layer, edits, undo)
        yield


def steered_by(
    loaded: LoadedRun, card: Path | None, split: str = "", files: Path | None = None
) -> AbstractContextManager[None]:
    """Steer by a card, or not at all, while a split or files are measured, or nothing is."""
    if card is None:
        return nullcontext()
    measured = [text_mark(loaded, split, files)] if split else []
    return steered(loaded.model, open_card(loaded, card, measured))


def open_card(loaded: LoadedRun, path: Path, measured: Sequence[str] = ()) -> Steering:
    """A card that fits the run. Says so on standard error if it was made for another run or step, where
    the same numbers are other experts, or found on what is measured, by `text_mark`."""
    steering, here = load_card(path), made_for(loaded)
    require_fit(loaded.model, steering)
    if steering.made_for not in ("", here):
        print(f"warning: {path} was made for {steering.made_for}; this is {here}", file=sys.stderr)
    if any(mark in steering.description for mark in measured):
        print(f"warning: {path}, {steering.description}, is measured there, too", file=sys.stderr)
    return steering


def made_for(loaded: LoadedRun) -> str:
    """Run and step, as cards name them."""
    return f"{loaded.run.path.name}, step {loaded.trainer['step']}"


def text_mark(loaded: LoadedRun, split: str = "valid", files: Path | None = None) -> str:
    """What tells a split of the run's corpus, or the contents of files, from other texts on a card."""
    if files is None:
        parts = [str(loaded.run.environment().get("corpus_fingerprint")), split]
    else:
        parts = [file_sha256(path) for path in list_files((files,))]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def load_card(path: Path) -> Steering:
    """A steering from its JSON card; raises `ConfigError` naming the file and the entry."""
    try:
        return Steering.model_validate(json.loads(path.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a steering card ({error})") from None


def save_card(steering: Steering, path: Path) -> None:
    """Write the JSON card; raises `ConfigError` rather than replace a file that is none."""
    require_card(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, steering.model_dump_json(indent=1) + "\n")


def require_card(path: Path) -> None:
    """Raise `ConfigError` where a card cannot go: a folder, or a file that is something else."""
    require_file(path)
    if path.exists():
        try:
            load_card(path)
        except ConfigError:
            raise ConfigError(
                f"{path} exists and is no steering card; choose another --out"
            ) from None


def _is_neutral(edit: Edit) -> bool:
    return (
        (isinstance(edit, Boost) and edit.by == 0)
        or (isinstance(edit, Scale) and edit.by == 1)
        or (isinstance(edit, Towards) and edit.strength == 0)
    )


def _of(edits: Sequence[Edit], kind: type[Kind]) -> list[Kind]:
    return [edit for edit in edits if isinstance(edit, kind)]


def _steer_layer(layer: MoELayer, edits: Sequence[Edit], undo: ExitStack) -> None:
    """Put the layer's edits in front of its functions."""
    towards, scales = _of(edits, Towards), _of(edits, Scale)
    choices = [e for e in edits if isinstance(e, (Suppress, Boost, Pin))]
    replaced = _of(edits, Replace)
    router: Any = layer.router
    if towards:
        undo.enter_context(_in_front(layer, _moved(layer, towards)))
        if layer.config.expert_kind == "block":  # which run before the layer, on the same vectors
            undo.enter_context(_in_front(layer.backend, _moved(layer, towards)))
    if choices:
        undo.enter_context(_in_front(router, _rerouted(router, choices)))
    if scales:
        undo.enter_context(_in_front(router, _scaled(router.slots, scales)))
    if replaced:
        if layer.opened:
            undo.enter_context(_in_front(layer, _with_routes(replaced), "routes"))
        else:
            undo.enter_context(_in_front(layer.backend, _with_outputs(replaced)))


@contextmanager
def _in_front(
    module: nn.Module, around: Callable[..., Any], name: str = "forward"
) -> Iterator[None]:
    """For a while `module(...)`, or its method of this name, is `around(own, ...)`; hooks of others go on
    as before."""
    own, before = getattr(module, name), vars(module).get(name)
    setattr(module, name, lambda *arguments: around(own, *arguments))
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


def _moved(layer: MoELayer, edits: list[Towards]) -> Callable[..., Any]:
    rows_ED = anchor_rows(layer.router)
    directions = []
    for edit in edits:
        if isinstance(edit.direction, tuple):
            vector_D = torch.tensor(edit.direction)
        else:
            assert rows_ED is not None
            vector_D = rows_ED[edit.expert].detach()
        directions.append((edit.strength, normalize(widened(vector_D), dim=0)))

    def forward(own: Callable[..., Any], x_TD: Tensor, *rest: Any) -> Any:
        length_T1 = x_TD.norm(dim=-1, keepdim=True)
        step_D = sum(strength * unit_D.to(x_TD) for strength, unit_D in directions)
        return own(x_TD + length_T1 * step_D, *rest)

    return forward


def _rerouted(router: ScoringRouter, edits: Sequence[Suppress | Boost | Pin]) -> Callable[..., Any]:
    """Routing by edited scores, for the tokens that an edited expert serves before or after."""
    pinned = [edit.expert for edit in edits if isinstance(edit, Pin)]
    edited_E = torch.zeros(router.slots, dtype=torch.bool)
    edited_E[[edit.expert for edit in edits]] = True

    def forward(
        own: Callable[..., Routing],
        x_TD: Tensor,
        valid_T: Tensor | None = None,
        token_ids_T: Tensor | None = None,
        keep_scores: bool = False,
    ) -> Routing:
        before = own(x_TD, valid_T, token_ids_T, True)
        assert before.scores_TE is not None
        scores_TE = before.scores_TE.clone()
        scores_TE[:, pinned] = scores_TE.max(-1, keepdim=True).values
        for edit in edits:
            if isinstance(edit, Boost):
                scores_TE[:, edit.expert] += edit.by
            elif isinstance(edit, Suppress):
                scores_TE[:, edit.expert] = -torch.inf
        bias_E = router.bias_S().clone()
        bias_E[pinned] = CERTAIN
        top_k = before.expert_ids_TK.shape[-1]
        after = top_k_routing(scores_TE, top_k, router.config.gate, Selection(valid_T, bias_E))
        marked_E = edited_E.to(x_TD.device)
        touched_T1 = (marked_E[before.expert_ids_TK] | marked_E[after.expert_ids_TK]).any(
            -1, keepdim=True
        )
        return _merge(before, Routing(*after), touched_T1, scores_TE, valid_T)._replace(
            scores_TE=scores_TE if keep_scores else None
        )

    return forward


def _merge(
    before: Routing, after: Routing, touched_T1: Tensor, scores_TE: Tensor, valid_T: Tensor | None
) -> Routing:
    """`after` where a token is touched, else `before`; statistics of the mixture."""
    ids_TK = torch.where(touched_T1, after.expert_ids_TK, before.expert_ids_TK)
    gates_TK = torch.where(touched_T1, after.gates_TK, before.gates_TK)
    lse_T = scores_TE.logsumexp(-1)
    probs_TE = (scores_TE - lse_T.unsqueeze(-1)).exp()
    load_E, mean_probs_E, lse_T, count = statistics(probs_TE, ids_TK, lse_T, valid_T)
    return before._replace(
        gates_TK=gates_TK,
        expert_ids_TK=ids_TK,
        load_E=load_E,
        mean_probs_E=mean_probs_E,
        lse_T=lse_T,
        valid_count=count,
    )


def _scaled(experts: int, edits: list[Scale]) -> Callable[..., Any]:
    factor_E, renormalised_E = torch.ones(experts), torch.zeros(experts, dtype=torch.bool)
    for edit in edits:
        factor_E[edit.expert] *= edit.by
        renormalised_E[edit.expert] |= edit.renormalise

    def forward(own: Callable[..., Routing], *arguments: Any) -> Routing:
        routing = own(*arguments)
        ids_TK, gates_TK = routing.expert_ids_TK, routing.gates_TK
        scaled_TK = gates_TK * factor_E.to(gates_TK)[ids_TK]
        ratio_T1 = gates_TK.sum(-1, keepdim=True) / scaled_TK.sum(-1, keepdim=True)
        wanted_T1 = renormalised_E.to(ids_TK.device)[ids_TK].any(-1, keepdim=True)
        wanted_T1 &= ratio_T1.isfinite()
        scaled_TK = torch.where(wanted_T1, scaled_TK * ratio_T1, scaled_TK)
        return routing._replace(gates_TK=scaled_TK)

    return forward


def _with_outputs(edits: list[Replace]) -> Callable[..., Any]:
    def forward(own: Callable[..., Tensor], x_TD: Tensor, routing: Routing) -> Tensor:
        ids_TK, gates_TK = routing.expert_ids_TK, routing.gates_TK
        sent_TK, kept_TK = ids_TK, gates_TK
        for edit in edits:
            here_TK = ids_TK == edit.expert
            if isinstance(edit.output, int):
                sent_TK = torch.where(here_TK, edit.output, sent_TK)
            else:
                kept_TK = kept_TK.masked_fill(here_TK, 0.0)
        out_TD = own(x_TD, routing._replace(expert_ids_TK=sent_TK, gates_TK=kept_TK))
        for edit in edits:
            if isinstance(edit.output, tuple):
                gate_T1 = (gates_TK * (ids_TK == edit.expert)).sum(-1, keepdim=True)
                fixed_D = torch.tensor(edit.output, dtype=out_TD.dtype, device=out_TD.device)
                out_TD = out_TD + gate_T1.to(out_TD.dtype) * fixed_D
        return out_TD

    return forward


def _with_routes(edits: list[Replace]) -> Callable[..., Any]:
    """The same where outputs are kept apart: what is coupled then is the replaced output."""

    def routes(own: Callable[..., Tensor], x_TD: Tensor, routing: Routing, given: Given) -> Tensor:
        ids_TK = sent_TK = routing.expert_ids_TK
        for edit in edits:
            if isinstance(edit.output, int):
                sent_TK = torch.where(ids_TK == edit.expert, edit.output, sent_TK)
        rows_TKD = own(x_TD, routing._replace(expert_ids_TK=sent_TK), given)
        for edit in edits:
            if not isinstance(edit.output, int):
                fixed = 0.0 if edit.output == "zero" else edit.output
                fixed_D = torch.tensor(fixed, dtype=rows_TKD.dtype, device=rows_TKD.device)
                rows_TKD = torch.where((ids_TK == edit.expert).unsqueeze(-1), fixed_D, rows_TKD)
        return rows_TKD

    return routes


def require_fit(model: LanguageModel, steering: Steering) -> None:
    """Raise `ConfigError` for the first edit that this model cannot take."""
    layers = model.routed_layers()
    for number, edit in enumerate(steering.edits):
        if edit.layer >= len(layers):
            problem: str | None = f"the model has {len(layers)} routed layers, from 0"
            if not layers:
                problem = "the model has no routed layers; nothing to steer"
        else:
            problem = _problem(layers[edit.layer], edit)
        if problem is not None:
            place = f"edit {number} ({edit.kind} {edit.layer}:{edit.expert})"
            raise ConfigError(f"steering {steering.name!r}, {place}: {problem}")
    for number, layer in enumerate(layers):
        own = _of([e for e in steering.edits if e.layer == number], Suppress)
        experts, top_k = int(layer.router.slots), int(layer.router.top_k)
        left = experts - len({edit.expert for edit in own})
        if left < top_k:
            raise ConfigError(
                f"steering {steering.name!r} leaves {left} experts of layer {number}; the router "
                f"chooses {top_k}"
            )


def _problem(layer: MoELayer, edit: Edit) -> str | None:
    """Why a layer cannot take an edit."""
    router: Any = layer.router
    scored = isinstance(router, ScoringRouter)
    vector = edit.direction if isinstance(edit, Towards) else getattr(edit, "output", None)
    if edit.expert >= router.slots:
        return f"the layer has {router.slots} experts, from 0"
    if isinstance(edit, (Suppress, Boost, Pin)) and not scored:
        return "this router has no scores to edit; scale and replace work"
    if vector == "anchor" and not scored:
        return "this router has no anchors; give a vector"
    if isinstance(vector, tuple) and len(vector) != layer.width:
        return f"its vector has {len(vector)} numbers, the model's have {layer.width}"
    if isinstance(vector, int) and not 0 <= vector < router.slots:
        return f"there is no expert {vector} to take the output of"
    return None
