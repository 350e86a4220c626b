"""What a process trains on: its micro-batches of every step, and how many targets the step has.

    windows      windows of T tokens across documents, all of one size
    documents    pieces of documents of similar length, as many as fit into the micro-batch's tokens

Both are functions of (seed, step) alone: neither the number of processes nor a resume changes a step.
"""

from typing import Protocol

from sra_ds.config import Recipe
from sra_ds.data.budget import TrainingDocuments
from sra_ds.data.loader import Batch, TrainingWindows
from sra_ds.data.shards import TokenCorpus
from sra_ds.training.ds_config import BatchPlan


class Feed(Protocol):
    """The data of a run, as one process sees it."""

    def batch(self, step: int, micro: int) -> Batch:
        """This process's part of a micro-batch of a step (from 0)."""

    def targets(self, step: int) -> int:
        """Targets of the whole step, over all processes."""

    def epoch(self, step: int) -> float:
        """Epochs that the first `step` steps make."""


class WindowFeed:
    """Equal windows; every token is a target."""

    def __init__(self, windows: TrainingWindows, plan: BatchPlan, rank: int) -> None:
        self.windows, self.plan, self.rank = windows, plan, rank

    def batch(self, step: int, micro: int) -> Batch:
        part = self.plan.rank_slice(micro, self.rank)
        return self.windows.batch(step, self.plan.batch_size, part)

    def targets(self, step: int) -> int:
        del step
        return self.plan.batch_size * self.windows.length

    def epoch(self, step: int) -> float:
        return step * self.plan.batch_size / self.windows.count


class DocumentFeed:
    """Batches of documents, one for each micro-batch of each process."""

    def __init__(self, documents: TrainingDocuments, plan: BatchPlan, rank: int) -> None:
        self.documents, self.plan, self.rank = documents, plan, rank
        self.per_step = plan.accumulation * plan.world_size
        self._counted: tuple[int, int] = (-1, 0)

    def batch(self, step: int, micro: int) -> Batch:
        own = micro * self.plan.world_size + self.rank
        return self.documents.batch(step * self.per_step + own)

    def targets(self, step: int) -> int:
        if self._counted[0] != step:
            numbers = range(step * self.per_step, (step + 1) * self.per_step)
            self._counted = (step, sum(map(self.documents.targets, numbers)))
        return self._counted[1]

    def epoch(self, step: int) -> float:
        return step * self.per_step / self.documents.count


def build_feed(recipe: Recipe, corpus: TokenCorpus, plan: BatchPlan, rank: int) -> Feed:
    """The feed that a recipe asks for. Raises `DataError` for a corpus that is too short."""
    split, length, seed = corpus.split("train"), recipe.data.sequence_length, recipe.training.seed
    if recipe.training.batching == "documents":
        budget = plan.micro_batch_size * length
        documents = TrainingDocuments(split, length, budget, seed, corpus.end_of_text_id)
        return DocumentFeed(documents, plan, rank)
    return WindowFeed(TrainingWindows(split, length, seed, corpus.end_of_text_id), plan, rank)
