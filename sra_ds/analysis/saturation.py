"""How early routing settles: overlap of each checkpoint's choices with the last one's.

Router saturation (OLMoE, arXiv 2409.02060): the share of a token's final K experts that the model
already chose at step t. Earlier checkpoints choose as many experts as the last, whatever their schedule
said. Chance is K / E.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from sra_ds.analysis.traces import Pass, traced_batches
from sra_ds.data.loader import IGNORED
from sra_ds.data.shards import TokenSplit
from sra_ds.inference.load import load_weights_into
from sra_ds.model.language_model import LanguageModel

SAMPLED_TOKENS = 16_384


@torch.no_grad()
def choices(model: LanguageModel, split: TokenSplit, how: Pass) -> NDArray[np.int64]:
    """Experts of each token and layer, N x L x K."""
    chosen = []
    for batch, _ in traced_batches(split, how):
        counted_T = (batch.targets_BT != IGNORED).flatten()
        own = batch.to(how.device)
        _, found = model.encode(own.ids_BT, own.document_ids_BT, own.valid_BT)
        ids_TLK = torch.stack([routing.expert_ids_TK.cpu() for routing in found.routings], 1)
        chosen.append(ids_TLK[counted_T])
    return torch.cat(chosen).numpy()


def saturation(
    model: LanguageModel, checkpoints: dict[int, Path], split: TokenSplit, how: Pass
) -> dict[int, list[float]]:
    """Per step and layer, the mean share of the choices of the last checkpoint that were made already.
    The model is left with the weights it came with."""
    if len(checkpoints) < 2:
        return {}
    own = {name: value.clone() for name, value in model.state_dict().items()}
    how = how._replace(max_tokens=min(how.max_tokens or SAMPLED_TOKENS, SAMPLED_TOKENS))
    found: dict[int, NDArray[np.int64]] = {}
    try:
        for step in tqdm(sorted(checkpoints), "checkpoints", leave=False):
            load_weights_into(model, checkpoints[step])
            found[step] = choices(model, split, how)
    finally:
        model.load_state_dict(own)
    last = found[max(found)]
    return {step: overlap(chosen, last).tolist() for step, chosen in found.items()}


def overlap(earlier_NLK: NDArray[np.int64], last_NLK: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean share of the last choices among the earlier ones, per layer."""
    common = (earlier_NLK[..., :, None] == last_NLK[..., None, :]).sum((-1, -2))
    means_L: NDArray[np.float64] = (common / last_NLK.shape[-1]).mean(0)
    return means_L
