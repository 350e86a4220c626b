"""A finished cell: what one run came to, in one JSON file that needs nothing else to be compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from sra_ds.errors import ConfigError, DataError
from sra_ds.evaluation.compare.budgets import Budget, budget
from sra_ds.evaluation.compare.cells import name_of
from sra_ds.evaluation.compare.settings import portable
from sra_ds.evaluation.experts import last_specialisation
from sra_ds.evaluation.perplexity import exp_or_infinity
from sra_ds.intervals import Array
from sra_ds.storage.run_dir import RunDir, open_run, read_json_object, write_atomically


class Health(BaseModel):
    """Of the experts of all layers, over the tokens a run counted at its end."""

    model_config = ConfigDict(frozen=True)
    dead_fraction: float
    """Share of the experts with fewer than 1e-4 of their layer's routes."""
    load_cv: float
    """Standard deviation over mean of the loads, mean over layers."""
    max_violation: float
    """Largest load over mean load, less 1, over all layers."""


class Coherence(BaseModel):
    """What `tools/analyze.py` found in the words of the experts, mean over layers."""

    model_config = ConfigDict(frozen=True)
    share: float
    """Of the experts whose words are more coherent (C_NPMI) than the 95 % null; 5 % by chance."""
    untrained: float | None
    """The same for untrained routers on the same vectors."""
    text: str
    tokens: int


class Point(BaseModel):
    """An evaluation during training."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")
    step: int
    epoch: float
    token_perplexity: float
    """Over the documents that every evaluation of the run scores."""
    legacy_sra_perplexity: float | None = None
    """The published protocol, which counts padding, where the whole split was scored."""
    legacy_sra_perplexity_if_padding_were_free: float | None = None


class FinishedCell(BaseModel):
    """One run: settings, what it cost, and what it came to on the whole validation split."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")
    recipe: str
    seed: int
    run: str
    settings: dict[str, Any]
    """The merged recipe, of files and folders the names alone."""
    token_perplexity: float
    word_perplexity: float
    bits_per_byte: float
    accuracy: float
    nll_per_token: float
    document_nll: tuple[float, ...]
    """Nats of each validation document, and its number of tokens."""
    document_tokens: tuple[int, ...]
    curve: tuple[Point, ...]
    experts: Health | None
    coherence: Coherence | None = None
    """Where `tools/analyze.py` has looked at the last checkpoint."""
    specialisation: float | None
    tokens: int
    """Seen in training."""
    seconds: float
    """Of its training steps."""
    tokens_per_second: float
    peak_memory_bytes: int | None
    """Of the first process (of its GPU, if it has one)."""
    processes: int
    device: str
    budget: Budget
    live_share: float | None
    """Of the entries of sparse matrices."""
    corpus_fingerprint: str

    @property
    def name(self) -> str:
        """What its file is called, between `cell-` and `.json`."""
        return name_of(self.recipe, self.seed)

    @property
    def analysed(self) -> str | None:
        """The text that `coherence` is of."""
        return (
            None
            if self.coherence is None
            else f"{self.coherence.tokens:,} tokens, {self.coherence.text}"
        )

    def losses(self) -> tuple[Array, Array]:
        """Nats and tokens of each validation document."""
        return np.array(self.document_nll), np.array(self.document_tokens)


def cell_file(folder: Path, name: str) -> Path:
    """Where the cell of that name is kept."""
    return folder / f"cell-{name}.json"


def write_cell(cell: FinishedCell, folder: Path) -> None:
    """As `cell-NAME-sSEED.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(cell_file(folder, cell.name), cell.model_dump_json(indent=1))


def read_cell(path: Path) -> FinishedCell:
    """Raises `DataError` for a file that is no finished cell."""
    try:
        return FinishedCell.model_validate(read_json_object(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: not a finished cell ({where}: {first['msg']})") from None


def _curve(metrics: Sequence[dict[str, Any]]) -> tuple[Point, ...]:
    """The evaluations of a run, from its metrics."""
    return tuple(
        Point(
            step=line["step"],
            epoch=line["epoch"],
            token_perplexity=exp_or_infinity(line["validation"]["capped_nll_per_token"]),
            **{
                name: line["validation"].get(name)
                for name in Point.model_fields
                if name.startswith("legacy")
            },
        )
        for line in metrics
        if "validation" in line
    )


def _coherence(run: RunDir, step: int) -> Coherence | None:
    found = run.analysis(step)
    if found is None or found["summary"]["coherent"] is None:
        return None
    return Coherence(
        share=found["summary"]["coherent"],
        untrained=found["summary"]["coherent_untrained"],
        text=found["text"],
        tokens=found["tokens"],
    )


def cell_of_run(path: Path) -> FinishedCell:
    """What a run that is finished came to. Raises `ConfigError` for one that is not, `DataError` for one
    without losses by document."""
    run = open_run(path)
    if not run.summary_file.is_file():
        raise ConfigError(f"{path} has no summary.json: the run is not finished")
    documents = run.evaluation / "valid_documents.npz"
    if not documents.is_file():
        raise DataError(f"{documents} is missing: the run has no per-document losses")
    summary, recipe = read_json_object(run.summary_file), run.recipe()
    figures = ("token_perplexity", "word_perplexity", "bits_per_byte", "accuracy", "nll_per_token")
    cost, live = budget(recipe)
    metrics = run.metrics()
    with np.load(documents, allow_pickle=False) as arrays:
        nll, tokens = arrays["nll"], arrays["tokens"]
    return FinishedCell(
        recipe=recipe.name,
        seed=recipe.training.seed,
        run=str(path),
        settings=portable(recipe),
        **{name: summary["validation"][name] for name in figures},
        document_nll=tuple(round(float(nats), 6) for nats in nll),
        document_tokens=tuple(map(int, tokens)),
        curve=_curve(metrics),
        experts=summary["experts"],
        coherence=_coherence(run, summary["steps"]),
        specialisation=(last_specialisation(metrics) or {}).get("mean"),
        tokens=summary["tokens"],
        seconds=summary["seconds"],
        tokens_per_second=summary["tokens_per_second"],
        peak_memory_bytes=summary.get("peak_memory_bytes"),
        processes=run.environment()["world_size"],
        device=summary["device"],
        budget=cost,
        live_share=live,
        corpus_fingerprint=summary["corpus_fingerprint"],
    )
