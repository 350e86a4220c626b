"""Why each token of a text went where it went: chosen experts, near misses, what they are known for.

Cosines are scores over the temperature, for routers with anchors, without what a waking ghost's score is
lowered by; a linear router has scores alone. The margin is the lead of the last chosen expert over the
first that was not. Letters: T tokens, E experts.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sra_ds.analysis.profiles import readable
from sra_ds.data.loader import document_ids
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import DataError
from sra_ds.inference.load import LoadedRun
from sra_ds.moe.routing import Routing

KNOWN_TOKENS = 5


class Choice(NamedTuple):
    """One expert for one token; `gate` is None for one that was not chosen."""

    expert: int
    gate: float | None
    score: float
    cosine: float | None


class Decision(NamedTuple):
    """One layer's routing of one token."""

    chosen: list[Choice]
    near: list[Choice]
    margin: float | None


class Explanation(NamedTuple):
    """`tokens` as text, the one that opens the document first; `decisions` token by token, then layer by
    layer; `known` says what experts are known for, by "layer:expert"."""

    tokens: list[str]
    decisions: list[list[Decision]]
    known: dict[str, dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {
                "token": token,
                "layers": [
                    {
                        "chosen": [choice._asdict() for choice in layer.chosen],
                        "near": [choice._asdict() for choice in layer.near],
                        "margin": layer.margin,
                    }
                    for layer in layers
                ],
            }
            for token, layers in zip(self.tokens, self.decisions, strict=True)
        ]
        return {"tokens": rows, "experts": self.known}


@torch.no_grad()
def explain(loaded: LoadedRun, text: str, near: int = 3) -> Explanation:
    """Route a text, window by window if it is longer than the model's. Raises `DataError` for a dense
    model and for an empty text."""
    model, routers = loaded.model, loaded.model.routers()
    if not routers:
        raise DataError(f"{loaded.run.path}: the model has no routed layers; nothing to explain")
    ids = loaded.tokenizer.encode(text).ids
    if not ids:
        raise DataError("the text is empty; give --text some words")
    ids = [end_of_text_id(loaded.tokenizer), *ids]
    device, length = next(model.parameters()).device, loaded.recipe.data.sequence_length
    decisions: list[list[Decision]] = []
    for start in range(0, len(ids), length):
        ids_BT = torch.tensor([ids[start : start + length]], device=device)
        documents_BT = document_ids(ids_BT, ids[0])
        _, found = model.encode(ids_BT, documents_BT, keep_scores=True)
        decided = zip(routers, found.routings, strict=True)
        layers = [_decide(router, routing, near) for router, routing in decided]
        decisions += [list(own) for own in zip(*layers, strict=True)]
    return Explanation(readable(loaded.tokenizer, ids), decisions, known_experts(loaded))


def known_experts(loaded: LoadedRun) -> dict[str, dict[str, Any]]:
    """Specialisation and top tokens of each expert, if this checkpoint of the run was analysed."""
    found = loaded.run.analysis(loaded.trainer["step"])
    if found is None:
        return {}
    return {
        f"{expert['layer']}:{expert['expert']}": {
            "specialisation": expert["specialisation"],
            "top_tokens": expert["top_tokens"][:KNOWN_TOKENS],
        }
        for expert in found["experts"]
    }


def _decide(router: Any, routing: Routing, near: int) -> list[Decision]:
    assert routing.scores_TE is not None
    scores_TE = routing.scores_TE.double().cpu()
    cosines_TE = _cosines(router, scores_TE)
    order_TE = scores_TE.argsort(dim=1, descending=True, stable=True)
    decisions = []
    for token, chosen in enumerate(routing.expert_ids_TK.tolist()):
        gates = routing.gates_TK[token].tolist()
        others = [
            e
            for e in order_TE[token].tolist()
            if e not in chosen and scores_TE[token, e].isfinite()  # not of one that is suppressed
        ]

        def choice(expert: int, gate: float | None, at: int = token) -> Choice:
            cosine = None if cosines_TE is None else float(cosines_TE[at, expert])
            return Choice(expert, gate, float(scores_TE[at, expert]), cosine)

        picked = [choice(e, g) for e, g in zip(chosen, gates, strict=True)]
        missed = [choice(expert, None) for expert in others]
        margin = min(c.score for c in picked) - missed[0].score if missed else None
        decisions.append(Decision(picked, missed[:near], margin))
    return decisions


def _cosines(router: Any, scores_TE: Tensor) -> Tensor | None:
    if not hasattr(router, "anchors"):
        return None
    temperature: Tensor = router.temperature.detach().double().abs().cpu()
    shift_E = router.shift_S()
    return (scores_TE if shift_E is None else scores_TE - shift_E.double().cpu()) / temperature


def table(explanation: Explanation, layer: int | None = None) -> Iterator[str]:
    """One line for each token and layer: chosen experts, margin, near misses, what the first is known
    for."""
    chosen = "expert:cosine or score"
    yield f"{'token':<16} layer  {chosen:<28} {'lead':>6}  (near misses)  tokens of the first"
    for token, decisions in zip(explanation.tokens, explanation.decisions, strict=True):
        for number, decision in enumerate(decisions):
            if layer not in (None, number):
                continue
            chosen = " ".join(map(_described, decision.chosen))
            near = " ".join(map(_described, decision.near))
            margin = "" if decision.margin is None else f"{decision.margin:.3f}"
            known = explanation.known.get(f"{number}:{decision.chosen[0].expert}", {})
            tokens = " ".join(known.get("top_tokens", []))
            yield f"{token!r:<16} {number:>5}  {chosen:<28} {margin:>6}  ({near})  {tokens}"


def _described(choice: Choice) -> str:
    """Expert and cosine, or score where there is none."""
    return f"{choice.expert}:{choice.score if choice.cosine is None else choice.cosine:.3f}"
