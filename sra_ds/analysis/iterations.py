"""Which tokens a model iterates on longest: iterations of each token of a text, by part of speech.

The number of a token is its mean over the layers that iterate. Every class stands beside the mean over
all tokens and an interval over blocks of documents; a class is only as good as its tagger (`syntax`).

Letters: N tokens of the text in order, L layers that iterate, C classes, B blocks of documents.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from sra_ds.analysis.statistics import (
    MANY_RESAMPLES,
    block_of_documents,
    bootstrap_interval,
    resampling_weights,
)
from sra_ds.analysis.syntax import CLASSES, tag_words, tagger_name
from sra_ds.analysis.words import of_units, read_words
from sra_ds.data.loader import IGNORED, scoring_batches, scoring_windows
from sra_ds.data.shards import TokenSplit
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import DataError
from sra_ds.evaluation.perplexity import documents_within
from sra_ds.heap import giving_back
from sra_ds.inference.load import LoadedRun

LEAST_TOKENS = 20
"""Times a token must occur to be named."""
NAMED = 15


class Counted(NamedTuple):
    """A text and the iterations of each of its tokens; NaN for its last, which nothing follows."""

    tokens_N: NDArray[np.int64]
    documents: NDArray[Any]
    iterations_LN: NDArray[np.float32]

    @property
    def tokens(self) -> int:
        """How many."""
        return len(self.tokens_N)


@torch.no_grad()
def count_iterations(
    loaded: LoadedRun, split: TokenSplit, max_tokens: int, batch_size: int, device: torch.device
) -> Counted:
    """One pass below the head over the split's first whole documents. Raises `DataError` for a model
    that does not iterate."""
    documents = documents_within(split, max_tokens)
    end = split.tokens
    if documents < len(split.documents):
        end = int(split.documents["start"][documents])
    length, mark = loaded.recipe.data.sequence_length, end_of_text_id(loaded.tokenizer)
    windows = scoring_windows(end, length, length)
    found: list[NDArray[np.float32]] = []
    batches = scoring_batches(split, windows, length, batch_size, mark)
    for batch, _ in tqdm(
        giving_back(batches), "iterations", -(-len(windows) // batch_size), leave=False
    ):
        own = batch.to(device)
        _, facts = loaded.model.encode(own.ids_BT, own.document_ids_BT, own.valid_BT)
        if not facts.haltings:
            raise DataError(f"{loaded.run.path}: the model does not iterate; nothing to count")
        count_LBT = torch.stack([halting.iterations_BT for halting in facts.haltings]).float().cpu()
        found.append(count_LBT[:, batch.targets_BT != IGNORED].numpy())
    iterations_LN = np.concatenate(found, 1)
    missing = np.full((len(iterations_LN), end - iterations_LN.shape[1]), np.nan, np.float32)
    return Counted(
        split.read(0, end), split.documents[:documents], np.concatenate([iterations_LN, missing], 1)
    )


def iterations_by_type(loaded: LoadedRun, counted: Counted) -> dict[str, Any]:
    """Mean iterations of all tokens, of each class of words, and the tokens with most and least."""
    words = read_words(counted, loaded.tokenizer)
    class_N = of_units(tag_words(words), words.unit_of_token_N)
    mean_N = counted.iterations_LN.mean(0, dtype=np.float64)
    block_D = block_of_documents(counted.documents["start"], counted.tokens)
    block_N = np.repeat(block_D, np.diff([*counted.documents["start"], counted.tokens]))
    real_N = np.isfinite(mean_N)
    classes = {
        name: _mean(mean_N, block_N, real_N & (class_N == number))
        for number, name in enumerate(CLASSES)
    }
    return {
        "tagger": tagger_name(),
        "all": _mean(mean_N, block_N, real_N),
        "by_layer": [float(np.nanmean(own_N)) for own_N in counted.iterations_LN],
        "classes": {name: found for name, found in classes.items() if found["tokens"]},
        **_extremes(loaded, counted.tokens_N[real_N], mean_N[real_N]),
    }


def _mean(
    value_N: NDArray[np.float64], block_N: NDArray[np.int64], chosen_N: NDArray[np.bool_]
) -> dict[str, Any]:
    """Mean over some tokens, with its interval over blocks of documents."""
    there, block_N = np.unique(block_N, return_inverse=True)
    blocks = len(there)
    sum_B = np.bincount(block_N[chosen_N], value_N[chosen_N], blocks)
    count_B = np.bincount(block_N[chosen_N], minlength=blocks)
    if not count_B.sum():
        return {"tokens": 0}
    mean = float(sum_B.sum() / count_B.sum())
    weights_RB = resampling_weights(blocks, MANY_RESAMPLES)
    with np.errstate(invalid="ignore"):
        resampled_R = (weights_RB @ sum_B) / (weights_RB @ count_B)
    low, high = bootstrap_interval(mean, resampled_R)
    return {"tokens": int(count_B.sum()), "iterations": mean, "low": low, "high": high}


def _extremes(
    loaded: LoadedRun, tokens_N: NDArray[np.int64], mean_N: NDArray[np.float64]
) -> dict[str, Any]:
    count_V = np.bincount(tokens_N)
    with np.errstate(invalid="ignore"):
        mean_V = np.bincount(tokens_N, mean_N) / count_V
    often = np.flatnonzero(count_V >= LEAST_TOKENS)
    ranked = often[np.argsort(-mean_V[often], kind="stable")]

    def named(ids: NDArray[np.int64]) -> list[dict[str, Any]]:
        return [
            {
                "token": loaded.tokenizer.decode([token], skip_special_tokens=False),
                "times": int(count_V[token]),
                "iterations": float(mean_V[token]),
            }
            for token in ids.tolist()
        ]

    return {"most": named(ranked[:NAMED]), "least": named(ranked[::-1][:NAMED])}
