"""What `tools/evaluate.py --coherence` says: documents that models wrote beside human ones and those
spoilt, by four measures that stay apart, with the names of all they were measured with."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sra_ds.data.shards import TokenCorpus
from sra_ds.evaluation.coherence.anchors import ANCHORS
from sra_ds.evaluation.coherence.cloze import connective_cloze
from sra_ds.evaluation.coherence.documents import (
    FEWEST,
    MOST,
    PROMPT_TOKENS,
    TEXT_TOKENS,
    Document,
    Passage,
    human_passages,
    written_documents,
)
from sra_ds.evaluation.coherence.encoder import Encoder, open_encoder
from sra_ds.evaluation.coherence.gap import gap_accuracy, read_gap
from sra_ds.evaluation.coherence.litbank import litbank_agreement, read_litbank
from sra_ds.evaluation.coherence.measures import Instruments, measure
from sra_ds.evaluation.coherence.models import RunModel, open_model
from sra_ds.evaluation.coherence.orders import ORDERS
from sra_ds.evaluation.coherence.scoring import TOP_P, TextModel
from sra_ds.evaluation.coherence.sentences import plain, splitter_name
from sra_ds.evaluation.coherence.tagging import Tagger
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import LoadedRun

FITTED_PASSAGES = 1000
"""Of the training split, for the encoder that stands in where there is no trained one."""


FEWEST_WORDS = 4
"""Of a sentence of English, on average."""


class Request(NamedTuple):
    """What to look at."""

    split: str = "valid"
    text: Path | None = None
    documents: int = 200
    seeds: int = 1
    baseline: Path | None = None
    """A run or a folder of transformers that continues the same prompts."""
    judge: Path | None = None
    """The same, to judge all documents instead of the evaluated run."""
    gap: Path | None = None
    litbank: Path | None = None


def named(request: Request, steer: Path | None, halting: str | None) -> str:
    """What the files of a result are called: `coherence`, and what sets it apart from the plain one."""
    parts = [
        "" if request.split == "valid" or request.text is not None else request.split,
        "" if request.text is None else request.text.stem,
        "" if request.judge is None else f"by-{request.judge.name}",
        "" if steer is None else f"steered-{steer.stem}",
        "" if halting is None else f"halting-{halting}",
    ]
    return re.sub(r"[^\w.-]+", "_", "-".join(["coherence", *filter(None, parts)]))


class Models(NamedTuple):
    """Who writes and who judges; the judge may be one of the writers."""

    writers: dict[str, TextModel]
    judge: TextModel

    def each(self, ask: Callable[[TextModel], Any]) -> dict[str, Any]:
        """What each of them answers, by what it does here."""
        apart = {} if self.judge in self.writers.values() else {"judge": self.judge}
        return {name: ask(model) for name, model in {**self.writers, **apart}.items()}


def score_coherence(loaded: LoadedRun, request: Request, device: torch.device) -> dict[str, Any]:
    """One JSON-able tree. Raises errors of `sra_ds.errors` for what is missing, before anything takes
    long."""
    splitter, tagger = splitter_name(), Tagger()
    models = _open_models(loaded, request, device)
    cases = None if request.gap is None else read_gap(request.gap)
    novels = None if request.litbank is None else read_litbank(request.litbank)
    with open_text(loaded, request.split, request.text) as text:
        passages = human_passages(text.split, loaded.tokenizer, request.documents, text.label)
    encoder = open_encoder(lambda: _fitting(text.corpus, loaded, passages), device)
    kinds, too_short = _documents(models.writers, passages, request.seeds)
    scores = measure(kinds, Instruments(models.judge, encoder.encode, tagger))
    found = {
        "run": str(loaded.run.path),
        "checkpoint": loaded.checkpoint.name,
        "text": text.label,
        "made_with": _names(models, encoder, splitter, tagger),
        "settings": _settings(passages, request, too_short),
        "notes": _notes(request, scores),
        "scores": scores,
        "connective_cloze": models.each(lambda model: connective_cloze(model, passages)),
    }
    if cases is not None:
        found["gap"] = models.each(lambda model: gap_accuracy(model, cases, tagger))
    if novels is not None:
        found["litbank"] = litbank_agreement(novels, tagger)
    return found


def _open_models(loaded: LoadedRun, request: Request, device: torch.device) -> Models:
    own = RunModel(loaded, device)
    writers: dict[str, TextModel] = {"generated": own}
    if request.baseline is not None:
        writers["baseline"] = open_model(request.baseline, "--baseline", device)
    if request.judge is None:
        return Models(writers, own)
    return Models(writers, open_model(request.judge, "--judge", device))


def _documents(
    writers: dict[str, TextModel], passages: list[Passage], seeds: int
) -> tuple[dict[str, list[Document]], dict[str, int]]:
    """By kind, and how many of each writer's were too short."""
    kinds: dict[str, list[Document]] = {}
    too_short = {}
    for name, model in writers.items():
        kinds[name], too_short[name] = written_documents(model, passages, seeds)
    for name, spoil in ANCHORS.items():
        kinds[name] = [Document(own.source, spoil(own.sentences)) for own in passages]
    return kinds, too_short


def _notes(request: Request, scores: dict[str, dict[str, Any]]) -> list[str]:
    """What a reader of the scores has to know."""
    notes = []
    if request.baseline is not None and request.judge is None:
        notes.append("discourse: the run judges its rival; a third model does by --judge")
    human = scores["human"]
    if human["semantic"]["value"] is None:
        notes.append("semantic needs texts of two sources at least")
    companions = human["companions"]
    if companions["words"] < FEWEST_WORDS * companions["sentences"]:
        notes.append("the human texts have hardly any words a sentence: this is made for English")
    return notes


def _names(models: Models, encoder: Encoder, splitter: str, tagger: Tagger) -> dict[str, Any]:
    return {
        "judge": models.judge.name,
        "encoder": encoder.name,
        "encoder_because": encoder.reason,
        "splitter": splitter,
        "tagger": tagger.name,
        "writers": {name: model.name for name, model in models.writers.items()},
    }


def _settings(
    passages: list[Passage], request: Request, too_short: dict[str, int]
) -> dict[str, Any]:
    return {
        "passages": len(passages),
        "sources": len({passage.source for passage in passages}),
        "seeds": request.seeds,
        "prompt_tokens": PROMPT_TOKENS,
        "tokens": TEXT_TOKENS,
        "temperature": 1.0,
        "top_p": TOP_P,
        "orders": ORDERS,
        "sentences_at_least": FEWEST,
        "sentences_at_most": MOST,
        "too_short": too_short,
    }


def _fitting(
    corpus: TokenCorpus | None, loaded: LoadedRun, passages: list[Passage]
) -> tuple[list[str], str]:
    """Plain sentences of the training split, or of the human passages where there is none, and which."""
    chosen, which = passages, "the human passages"
    if corpus is not None:
        split = corpus.split("train")
        chosen = human_passages(split, loaded.tokenizer, FITTED_PASSAGES)
        which = f"{len(chosen)} passages of the training split"
    return [plain(sentence) for passage in chosen for sentence in passage.sentences], which
