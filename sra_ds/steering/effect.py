"""What a steering does to the words a user names: before, after, against a null.

    share       probability that the next token is one of the words, mean over places
    others      the same of the other words
    log odds    log P(words) - log P(the other words), mean over places
    imbalance   |log P(words) - log P(the other words)|, mean over places
    spread      distance of a unit's log odds from the mean of all units

A place is every position of neutral text, or the end of a prompt; intervals are over windows of text or
over prompts. The null makes the same edits to other experts of the same layers and of nearest load.
Letters: B units (windows or prompts), T positions, V vocabulary, S tokens of a set, R draws of the null.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from sra_ds.analysis.statistics import Measured, measured_change
from sra_ds.analysis.traces import Pass, Trace, traced_batches
from sra_ds.config.steering import AnyEdit, Replace, Steering, Towards
from sra_ds.data.loader import IGNORED, Batch, document_ids
from sra_ds.data.shards import TokenSplit
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import ConfigError
from sra_ds.heap import giving_back
from sra_ds.inference.generate import left_padded
from sra_ds.inference.load import LoadedRun
from sra_ds.inference.places import Place
from sra_ds.inference.steer import steered
from sra_ds.model.language_model import LanguageModel

NULL_EXPERTS = 20
WINDOWS_AT_ONCE = 4
PROMPTS_AT_ONCE = 16

Floats = NDArray[np.float64]


class WordSets(NamedTuple):
    """Tokens of the words in question and of those they are held against, which may be none."""

    own_S: list[int]
    others_S: list[int]


def word_tokens(tokenizer: Tokenizer, words: Sequence[str]) -> list[int]:
    """The token of each word after a space, or without one where only that exists; of `/PATTERN/` all
    tokens the regular expression is found in. Raises `ConfigError` for a word of several tokens, and
    for a pattern that is none or is found nowhere."""
    found = []
    for word in words:
        if not word.strip():
            raise ConfigError("a word is empty; name it as it is written, without spaces")
        if len(word) > 2 and word[0] == word[-1] == "/":
            found += _matching(tokenizer, word[1:-1])
            continue
        forms = [tokenizer.encode(form).ids for form in (f" {word}", word)]
        single = [ids[0] for ids in forms if len(ids) == 1]
        if not single:
            pieces = " ".join(tokenizer.decode([i]) for i in forms[0])
            raise ConfigError(f"{word!r} is no single token of this model (pieces: {pieces})")
        found.append(single[0])
    return sorted(set(found))


def _matching(tokenizer: Tokenizer, pattern: str) -> list[int]:
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise ConfigError(f"/{pattern}/ is no regular expression ({error})") from None
    found = [i for i in range(tokenizer.get_vocab_size()) if search(tokenizer.decode([i]))]
    if not found:
        raise ConfigError(f"/{pattern}/ is found in no token of this model")
    return found


def neutral_batches(loaded: LoadedRun, split: TokenSplit, max_tokens: int) -> list[Batch]:
    """Windows of a split's first tokens, in which every position counts."""
    length, end = loaded.recipe.data.sequence_length, end_of_text_id(loaded.tokenizer)
    how = Pass(length, WINDOWS_AT_ONCE, end, max_tokens)
    return [batch for batch, _ in traced_batches(split, how)]


def prompt_batches(loaded: LoadedRun, prompts: Sequence[str]) -> list[Batch]:
    """Prompts as documents of their own, of which only the last position counts; a prompt longer than
    the model's window loses its beginning."""
    length, end = loaded.recipe.data.sequence_length, end_of_text_id(loaded.tokenizer)
    rows = [[end, *loaded.tokenizer.encode(text).ids][-length:] for text in prompts]
    batches = []
    for start in range(0, len(rows), PROMPTS_AT_ONCE):
        ids_BT, valid_BT = left_padded(rows[start : start + PROMPTS_AT_ONCE], end)
        targets_BT = torch.full_like(ids_BT, IGNORED)
        targets_BT[:, -1] = end
        batches.append(Batch(ids_BT, targets_BT, document_ids(ids_BT, end), valid_BT))
    return batches


@torch.no_grad()
def log_probs(model: LanguageModel, batch: Batch) -> Tensor:
    """B x T x V, of a batch of windows."""
    own = batch.to(next(model.parameters()).device)
    logits_BTV = model(own.ids_BT, None, own.document_ids_BT, own.valid_BT).logits
    assert logits_BTV is not None
    log_probs_BTV: Tensor = logits_BTV.log_softmax(-1)
    return log_probs_BTV


def token_divergences(was_BTV: Tensor, now_BTV: Tensor) -> Tensor:
    """KL(was || now) in nats at every position, B x T, from log probabilities."""
    kl_BT: Tensor = (was_BTV.exp() * (was_BTV - now_BTV)).sum(-1)
    return kl_BT


def divergence(
    model: LanguageModel,
    steering: Steering,
    batches: Sequence[Batch],
    bases: Sequence[Tensor] | None = None,
) -> float:
    """KL divergence in nats per token of the steered model from the unsteered one, whose log
    probabilities of each batch may be given."""
    total = tokens = 0.0
    for number, batch in enumerate(giving_back(batches)):
        was_BTV = log_probs(model, batch) if bases is None else bases[number]
        with steered(model, steering):
            kl_BT = token_divergences(was_BTV, log_probs(model, batch)).cpu()
        counted_BT = batch.targets_BT != IGNORED
        total += float(kl_BT[counted_BT].double().sum())
        tokens += int(counted_BT.sum())
    return total / tokens


def unit_means(values_BT: Tensor, counted_BT: Tensor) -> Floats:
    """Mean over the counted positions of each window."""
    kept_BT = torch.where(counted_BT, values_BT.cpu().double(), 0.0)
    means_B: Floats = (kept_BT.sum(-1) / counted_BT.sum(-1).clamp(min=1)).numpy()
    return means_B


def read_words(
    model: LanguageModel, batches: Iterable[Batch], words: WordSets
) -> dict[str, Floats]:
    """The measures of each unit, in the order of the batches."""
    found: dict[str, list[Floats]] = {}
    for batch in giving_back(batches):
        counted_BT = batch.targets_BT != IGNORED
        log_probs_BTV = log_probs(model, batch)
        own_BT = log_probs_BTV[..., words.own_S].logsumexp(-1)
        values = {"share": own_BT.exp()}
        if words.others_S:
            odds_BT = own_BT - log_probs_BTV[..., words.others_S].logsumexp(-1)
            others_BT = (own_BT - odds_BT).exp()
            values |= {"others": others_BT, "log_odds": odds_BT, "imbalance": odds_BT.abs()}
        for name, values_BT in values.items():
            found.setdefault(name, []).append(unit_means(values_BT, counted_BT))
    measures = {name: np.concatenate(parts) for name, parts in found.items()}
    if words.others_S:
        measures["spread"] = np.abs(measures["log_odds"] - measures["log_odds"].mean())
    return measures


class Effect(NamedTuple):
    """One measure: means before and after, and the change beside what other experts' changes are."""

    before: float
    after: float
    change: Measured

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"before": self.before, "after": self.after, "change": self.change.as_dict()}


def effect(
    loaded: LoadedRun,
    steering: Steering,
    batches: Sequence[Batch],
    words: WordSets,
    trace: Trace,
) -> dict[str, Effect]:
    """Every measure under a steering; `trace` tells the loads that choose the null's experts."""
    model = loaded.model
    before = read_words(model, batches, words)
    with steered(model, steering):
        after = read_words(model, batches, words)
    null: dict[str, list[float]] = {name: [] for name in before}
    for other in tqdm(elsewhere(steering, trace), "other experts", leave=False):
        with steered(model, other):
            there = read_words(model, batches, words)
        for name, values_B in there.items():
            null[name].append(float((values_B - before[name]).mean()))
    return {
        name: Effect(
            float(before[name].mean()),
            float(after[name].mean()),
            measured_change(after[name] - before[name], np.array(null[name])),
        )
        for name in before
    }


def nearest_in_load(trace: Trace, layer: int, expert: int) -> list[int]:
    """The other experts of a layer that serve anything, the nearest to it in load first."""
    load_E = trace.load_LE[layer]
    order = np.argsort(np.abs(load_E - load_E[expert]), kind="stable")
    return [int(e) for e in order if e != expert and load_E[e] > 0]


def elsewhere(steering: Steering, trace: Trace) -> list[Steering]:
    """The same edits dealt to other experts, at most `NULL_EXPERTS` times: in draw r each goes to the
    r-th nearest in load, or the next one that no other edit has taken. A direction that was given as a
    vector becomes the centroid of the expert it goes to."""
    places = sorted({Place(edit.layer, edit.expert) for edit in steering.edits})
    near = {place: nearest_in_load(trace, *place) for place in places}
    found: list[Steering] = []
    for draw in range(min([NULL_EXPERTS, *map(len, near.values())])):
        moved = _dealt(near, draw)
        if moved is not None:
            edits = tuple(_moved(edit, moved, trace) for edit in steering.edits)
            found.append(steering.model_copy(update={"edits": edits}))
    return found


def _dealt(near: dict[Place, list[int]], draw: int) -> dict[Place, int] | None:
    """Another expert of its layer for each place; None where the last ones find none free."""
    dealt: dict[Place, int] = {}
    taken: set[Place] = set()
    for place, others in near.items():
        free = (e for e in others[draw:] + others[:draw] if Place(place.layer, e) not in taken)
        expert = next(free, None)
        if expert is None:
            return None
        dealt[place] = expert
        taken.add(Place(place.layer, expert))
    return dealt


def _moved(edit: AnyEdit, moved: dict[Place, int], trace: Trace) -> AnyEdit:
    changes: dict[str, Any] = {"expert": moved[Place(edit.layer, edit.expert)]}
    if isinstance(edit, Towards) and isinstance(edit.direction, tuple):
        centroid_D = trace.centroids_LED[edit.layer, changes["expert"]]
        changes["direction"] = tuple(centroid_D.tolist())
    if isinstance(edit, Replace) and edit.output == changes["expert"]:
        changes["output"] = edit.expert  # its own output would be no edit
    return edit.model_copy(update=changes)
