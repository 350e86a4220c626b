"""A causal language model in a folder as transformers saves it: nothing is fetched, no code of the folder
is run, no pickle is read."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from sra_ds.errors import BackendUnavailable, ConfigError
from sra_ds.evaluation.coherence.scoring import TOP_P, prompt_batches
from sra_ds.inference.generate import left_padded
from sra_ds.seeds import generator

UNSTATED_WINDOW = 1024


class HfModel:
    """A `TextModel`. Raises `ConfigError` for a folder that holds none that can be used, and
    `BackendUnavailable` without transformers."""

    def __init__(self, path: Path, option: str, device: torch.device) -> None:
        self.model, self.tokenizer = _load(path, option)
        self.model.to(device).eval()
        self.device = device
        self._require_usable(f"{option} {path}")
        self.name = f"{path}, {type(self.model).__name__}"
        stated = getattr(self.model.config, "max_position_embeddings", None)
        self.window = int(stated or UNSTATED_WINDOW)
        marks = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        known = [mark for mark in marks if mark is not None]
        if not known:
            raise ConfigError(f"{option} {path}: its tokenizer has no token that opens a text")
        self.opening, self.closing = known[0], known[-1]

    @torch.inference_mode()
    def _require_usable(self, named: str) -> None:
        """A tokenizer that belongs to the model, and a model that does not read ahead."""
        ids = self.encode("The cat sat on the mat.")
        known = self.model.get_input_embeddings().num_embeddings
        if not ids or max(ids) >= known or len(self.tokenizer) > known:
            raise ConfigError(f"{named}: its tokenizer is missing or another model's")
        row_BT = torch.tensor([ids], device=self.device)
        other_BT = row_BT.clone()
        other_BT[0, -1] = (other_BT[0, -1] + 1) % known
        first_BTV, second_BTV = (self.model(input_ids=x_BT).logits for x_BT in (row_BT, other_BT))
        change = (first_BTV - second_BTV)[:, :-1].abs().max()
        if change > 1e-4 * first_BTV.abs().max():
            raise ConfigError(f"{named}: what it says of a token depends on later ones")

    def encode(self, text: str) -> list[int]:
        """Token ids; nothing opens or closes them."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def token_nll(self, ids_BT: Tensor, targets_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """-log p of each target."""
        logits_BTV = self.model(input_ids=ids_BT, attention_mask=valid_BT.long()).logits
        flat_NV = logits_BTV.float().flatten(0, 1)
        return F.cross_entropy(flat_NV, targets_BT.flatten(), reduction="none").view_as(ids_BT)

    def continuations(self, prompts: Sequence[str], most: int, seed: int) -> list[str]:
        """As `model.generate` draws them, by the seed and the prompts that are continued together; no
        text outgrows the window."""
        found: list[str] = []
        for batch in prompt_batches(prompts):
            opened = [[self.opening, *self.encode(prompt)] for prompt in batch]
            ids_BT, valid_BT = left_padded(opened, self.closing)
            new = min(most, self.window - ids_BT.shape[1])
            if new < 1:
                found += [""] * len(batch)
                continue
            with torch.random.fork_rng():
                torch.manual_seed(generator(seed, "sampling", *batch).initial_seed())
                drawn_BT = self._generate(ids_BT, valid_BT, new)
            found += self.tokenizer.batch_decode(drawn_BT, skip_special_tokens=True)
        return found

    @torch.inference_mode()
    def _generate(self, ids_BT: Tensor, valid_BT: Tensor, new: int) -> Tensor:
        drawn_BT: Tensor = self.model.generate(
            input_ids=ids_BT.to(self.device),
            attention_mask=valid_BT.long().to(self.device),
            do_sample=True, temperature=1.0, top_p=TOP_P, top_k=0, max_new_tokens=new,
            pad_token_id=self.closing, eos_token_id=self.closing,
        )  # fmt: skip
        return drawn_BT[:, ids_BT.shape[1] :]


def _load(path: Path, option: str) -> tuple[Any, Any]:
    """Model in float32 and tokenizer."""
    if importlib.util.find_spec("transformers") is None:
        raise BackendUnavailable(
            f"{option} {path} needs transformers: pip install 'sra_ds[coherence]'"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **local)
        model = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, dtype=torch.float32, **local
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{option} {path}: no causal language model that can be read ({reason})"
        ) from None
    return model, tokenizer
