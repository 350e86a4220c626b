"""Text from a model, one token at a time with cached keys and values, for several prompts at once.

    prompts -> token ids, padded on the left to one length -> logits of the last position
            -> penalty, temperature, top-k, top-p -> one draw a prompt -> text, as its bytes become whole

A prompt is continued the same whatever stands beside it in the batch: padding is invisible, and every
prompt draws from a generator of its own, seeded by the seed and its tokens.

Nothing stops at the length the model was trained on. Rotary positions go on beyond it, but those
distances between tokens were never seen, and the text gets worse. Letters: B prompts, T positions,
V entries of the tokenizer.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import ConfigError, DataError
from sra_ds.model.language_model import LanguageModel
from sra_ds.ops.precision import widened, widest
from sra_ds.seeds import generator

BROKEN = "\ufffd"
"""What undecodable bytes become."""


class Sampling(NamedTuple):
    """How the next token is drawn. Temperature 0 takes the most likely one."""

    temperature: float = 0.8
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the most likely tokens that together reach this probability; 1 keeps all."""
    seed: int = 0
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that are in the text already and multiplies negative ones (CTRL,
    arXiv 1909.05858); 1 changes nothing."""


DEFAULT_SAMPLING = Sampling()


class Continuation(NamedTuple):
    """What one prompt became; `ended` says that the model closed the document."""

    prompt: str
    text: str
    tokens: int
    ended: bool


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> Iterator[str]:
    """Pieces of text that continue the prompt, until the document ends or `max_tokens` are drawn.

    A character whose bytes are split over tokens comes out when it is whole.
    """
    end, produced, told = end_of_text_id(tokenizer), [], 0
    for (token,) in next_tokens(model, tokenizer, [prompt], max_tokens, sampling):
        if token == end:
            break
        produced.append(token)
        text = tokenizer.decode(produced)
        if not text.endswith(BROKEN):
            yield text[told:]
            told = len(text)
    rest = tokenizer.decode(produced)[told:]
    if rest:
        yield rest


def generate_batch(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> list[Continuation]:
    """What `generate` gives for each prompt, decoded side by side."""
    end = end_of_text_id(tokenizer)
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in next_tokens(model, tokenizer, prompts, max_tokens, sampling):
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
    found = []
    for prompt, row in zip(prompts, rows, strict=True):
        ids = row[: row.index(end)] if end in row else row
        found.append(Continuation(prompt, tokenizer.decode(ids), len(ids), end in row))
    return found


@torch.no_grad()
def next_tokens(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> Iterator[list[int]]:
    """One new token id of every prompt at a time; the end-of-text token over and over for those that
    have ended, until all have or `max_tokens` are drawn."""
    device, end = next(model.parameters()).device, end_of_text_id(tokenizer)
    opened = [[end, *tokenizer.encode(prompt).ids] for prompt in prompts]
    ids_BT, valid_BT = (part.to(device) for part in left_padded(opened, end))
    generators = [generator(sampling.seed, "sampling", *ids) for ids in opened]
    seen_BV = torch.zeros(len(prompts), tokenizer.get_vocab_size(), dtype=torch.bool, device=device)
    open_B, state = valid_BT[:, -1], model.new_state()
    for _ in range(max_tokens):
        seen_BV.scatter_(1, ids_BT, True)
        seen_BV[:, end] = False  # it opens every document and pads: that is no repetition
        logits_BTV = model(ids_BT, valid_BT=valid_BT, state=state).logits
        logits_BV = logits_BTV[:, -1, : seen_BV.shape[1]]
        uniform_B = torch.cat([torch.rand(1, generator=own) for own in generators]).to(device)
        drawn_B = draw(distribution(logits_BV, seen_BV, sampling), uniform_B)
        drawn_B = drawn_B.where(open_B, end)
        yield drawn_B.tolist()
        open_B = drawn_B != end
        if not open_B.any():
            return
        ids_BT, valid_BT = drawn_B[:, None], open_B[:, None]


def left_padded(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """(ids_BT, valid_BT): rows that end together, so that all of them go on at the same column."""
    longest = max(map(len, rows))
    lengths_B = torch.tensor([len(row) for row in rows])
    ids_BT = torch.tensor([[padding] * (longest - len(row)) + [*row] for row in rows])
    return ids_BT, torch.arange(longest) >= longest - lengths_B[:, None]


def distribution(logits_BV: Tensor, seen_BV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities the next token is drawn with, in float64 where the device has it; `seen_BV` marks the
    tokens a repetition penalty falls on. A token stays only if both top-k and top-p keep it."""
    penalty = sampling.repetition_penalty
    if penalty != 1:
        penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = torch.where(seen_BV, penalised_BV, logits_BV)
    if sampling.temperature == 0:
        return F.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1]).to(widest(logits_BV.device))
    logits_BV = widened(logits_BV)
    below_BV = logits_BV - logits_BV.amax(-1, keepdim=True)  # no overflow, however cold
    probs_BV = (below_BV / sampling.temperature).softmax(-1)
    ranked_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    keep_BV = torch.ones_like(ranked_BV, dtype=torch.bool)
    if sampling.top_p < 1:
        keep_BV = ranked_BV.cumsum(-1) - ranked_BV < sampling.top_p
    if sampling.top_k:
        keep_BV[:, sampling.top_k :] = False
    kept_BV = ranked_BV * keep_BV
    shares_BV = kept_BV / kept_BV.sum(-1, keepdim=True)
    return torch.zeros_like(shares_BV).scatter(-1, order_BV, shares_BV)


def draw(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """ids_B: the token in whose stretch of the summed probabilities a number from [0, 1) falls."""
    ends_BV = probs_BV.cumsum(-1)
    at_B1 = uniform_B[:, None].to(ends_BV.dtype) * ends_BV[:, -1:]
    return torch.searchsorted(ends_BV, at_B1, right=True).squeeze(-1)


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then those of a file, one a line without empty ones. Raises
    `ConfigError` for none and `DataError` for what is no text."""
    prompts = list(given)
    if file is not None:
        try:
            with file.open(encoding="utf-8") as stream:
                lines = [line.rstrip("\n") for line in stream]
        except UnicodeDecodeError:
            raise DataError(f"{file} is not UTF-8 text; write one prompt a line") from None
        prompts += [line for line in lines if line]
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise DataError(f"prompt {prompt!a} is not UTF-8 text") from None
    if not prompts:
        raise ConfigError(
            "there is no prompt; give --prompt TEXT, or --prompts FILE with some lines"
        )
    return prompts
