"""Language models that judge texts or write them, opened from a folder: a run of ours, or a causal model
as transformers saves it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.errors import ConfigError
from sra_ds.evaluation.coherence.hf_model import HfModel
from sra_ds.evaluation.coherence.scoring import TOP_P, TextModel, prompt_batches
from sra_ds.inference.generate import Sampling, generate_batch
from sra_ds.inference.load import LoadedRun, load_run


class RunModel:
    """A trained run as a `TextModel`."""

    def __init__(self, loaded: LoadedRun, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = loaded.model, loaded.tokenizer, device
        self.name = f"{loaded.run.path}, checkpoint {loaded.checkpoint.name}"
        self.window = loaded.recipe.data.sequence_length
        self.opening = end_of_text_id(loaded.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids; nothing opens or closes them."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def token_nll(self, ids_BT: Tensor, targets_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """-log p of each target."""
        nll_BT = self.model(ids_BT, targets_BT, valid_BT=valid_BT).token_nll_BT
        assert isinstance(nll_BT, Tensor)
        return nll_BT

    def continuations(self, prompts: Sequence[str], most: int, seed: int) -> list[str]:
        """As `generate_batch` draws them."""
        sampling = Sampling(temperature=1.0, top_p=TOP_P, seed=seed)
        found: list[str] = []
        for batch in prompt_batches(prompts):
            texts = generate_batch(self.model, self.tokenizer, batch, most, sampling)
            found += [one.text for one in texts]
        return found


def open_model(path: Path, option: str, device: torch.device) -> TextModel:
    """Raises `ConfigError`, naming the option that asked for it, for a folder that is neither."""
    if (path / "recipe.yaml").is_file():
        return RunModel(load_run(path, device=device), device)
    if (path / "config.json").is_file():
        return HfModel(path, option, device)
    raise ConfigError(
        f"{option} {path} is neither a run (recipe.yaml) nor a model of transformers (config.json)"
    )
