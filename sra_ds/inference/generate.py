"""Text from a model, one token at a time with cached keys and values."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.model.language_model import LanguageModel


class Sampling(NamedTuple):
    """How the next token is drawn. Temperature 0 takes the most likely one."""

    temperature: float = 0.8
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the most likely tokens that together reach this probability."""
    seed: int = 0


DEFAULT_SAMPLING = Sampling()


@torch.no_grad()
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
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    end = end_of_text_id(tokenizer)
    ids = torch.tensor([[end, *tokenizer.encode(prompt).ids]], device=device)
    state = model.new_state()
    produced: list[int] = []
    told = 0
    for _ in range(max_tokens):
        logits = model(ids, state=state).logits
        token = sample(logits[0, -1, : tokenizer.get_vocab_size()], sampling, generator)
        if token == end:
            break
        produced.append(token)
        ids = torch.tensor([[token]], device=device)
        text = tokenizer.decode(produced)
        if not text.endswith("\ufffd"):
            yield text[told:]
            told = len(text)


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token id."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    ranked_V, order_V = logits_V.softmax(-1).sort(descending=True, stable=True)
    keep_V = ranked_V.cumsum(-1) - ranked_V < sampling.top_p
    if sampling.top_k:
        keep_V[sampling.top_k :] = False
    weights_V = ranked_V * keep_V
    return int(order_V[torch.multinomial(weights_V, 1, generator=generator)])
