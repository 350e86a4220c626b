"""The protocol behind the published SRA perplexities, reproduced to show what it counts.

Each paragraph is cleaned (as published but for the Moses detokeniser) and cut into blocks of 256 tokens,
blocks under 128 are dropped, the rest filled with PAD (id 0), and PAD targets are scored like words; the
result is the exponential of the unweighted mean over batches of 128 blocks. About a quarter of the
targets are PAD, and a model trained that way pays nothing for any but the first. Never compare it with a
perplexity over real tokens.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from sra_ds.config.data import CorpusConfig, DocstringsConfig
from sra_ds.data.shards import TokenSplit
from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.evaluation.perplexity import Model, exp_or_infinity
from sra_ds.evaluation.ranks import share_of_rank
from sra_ds.processes import sum_over_ranks

BLOCK, SHORTEST, BATCH, PAD = 256, 128, 128, 0
FORWARD_BLOCKS = 16
HEADING = re.compile(r"^\s*=+.*=+\s*$")
WIKITEXT_MARK = re.compile(r" @([-.,/])@ ")
KINDS = ("real", "first_pad", "later_pad")


def hard_wrapped(data: CorpusConfig) -> bool:
    """Whether the paragraphs of a corpus end at blank lines, not at line ends."""
    return isinstance(data, DocstringsConfig)


def split_paragraphs(text: str, blank_line: bool) -> list[str]:
    """Cleaned paragraphs: a line each, or separated by blank lines where text is hard-wrapped."""
    raw = re.split(r"\n\s*\n", text) if blank_line else text.split("\n")
    kept = (p for p in raw if not HEADING.match(p))
    cleaned = (" ".join(WIKITEXT_MARK.sub(r"\1", p).replace("<unk>", " ").split()) for p in kept)
    return [p for p in cleaned if p]


def document_texts(split: TokenSplit, tokenizer: Tokenizer) -> Iterator[str]:
    """The split's raw text, which byte-level BPE gives back exactly."""
    starts = [*split.documents["start"].tolist(), split.tokens]
    for start, stop in itertools.pairwise(starts):
        yield tokenizer.decode(split.read(start + 1, stop).tolist(), skip_special_tokens=False)


def padded_blocks(paragraphs: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the blocks the protocol keeps, each filled to 256."""
    blocks = []
    for paragraph in paragraphs:
        ids = tokenizer.encode(paragraph).ids
        for start in range(0, len(ids), BLOCK):
            block = ids[start : start + BLOCK]
            if len(block) >= SHORTEST:
                blocks.append(block + [PAD] * (BLOCK - len(block)))
    return blocks


def target_kinds(targets_BT: Tensor) -> Tensor:
    """Index into `KINDS` for each target."""
    pad = targets_BT == PAD
    return pad.long() * torch.where(pad.cumsum(-1) == 1, 1, 2)


def legacy_sra(
    model: Model,
    split: TokenSplit,
    tokenizer: Tokenizer,
    blank_line: bool,
    device: torch.device,
    max_blocks: int = 1024,
    progress: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """The published figure with its parts, over the first `max_blocks` blocks; only `reason` if the
    text or tokenizer does not allow it. None when `stopped()` says so between batches.

    `blank_line` says that paragraphs are hard-wrapped. The model must be in eval mode. Collective when
    processes are connected: each scores its share and all get the sums. `perplexity` is the protocol's;
    `perplexity_if_padding_were_free` what a model trained on padding would report with the same real
    and first-PAD losses; `real_token_perplexity` counts words only.
    """
    if end_of_text_id(tokenizer) != PAD:
        return {"reason": "the tokenizer's end-of-text token, which stands in for PAD, is not id 0"}
    texts = document_texts(split, tokenizer)
    paragraphs = (p for text in texts for p in split_paragraphs(text, blank_line))
    found = padded_blocks(paragraphs, tokenizer)
    if not found:
        return {"reason": f"no paragraph has a block of {SHORTEST} tokens"}
    blocks_NT = torch.tensor(found[:max_blocks])
    counts_NK = _kinds(blocks_NT).sum(1).numpy()
    sums_NK = _score(model, blocks_NT, device, progress, stopped)
    if sums_NK is None:
        return None
    sums_K, counts_K = sums_NK.sum(0), counts_NK.sum(0)
    total = counts_K.sum()
    starts = range(0, len(blocks_NT), BATCH)
    batch_means = [sums_NK[n : n + BATCH].sum() / counts_NK[n : n + BATCH].sum() for n in starts]
    return {
        "note": "counts padding; not comparable with any other perplexity",
        "perplexity": exp_or_infinity(float(np.mean(batch_means))),
        "perplexity_if_padding_were_free": exp_or_infinity(float(sums_K[:2].sum() / total)),
        "real_token_perplexity": exp_or_infinity(float(sums_K[0] / counts_K[0])),
        "blocks": len(blocks_NT),
        "blocks_in_split": len(found),
        "pad_share": float(counts_K[1:].sum() / total),
        **{
            kind: {"targets": int(n), "nll_per_target": float(s / n) if n else None}
            for kind, s, n in zip(KINDS, sums_K, counts_K, strict=True)
        },
    }


@torch.no_grad()
def _score(
    model: Model,
    blocks_NT: Tensor,
    device: torch.device,
    progress: bool,
    stopped: Callable[[], bool],
) -> NDArray[np.float64] | None:
    """Summed loss of each block's targets by kind, over all ranks."""
    sums_NK = torch.zeros(len(blocks_NT), len(KINDS), dtype=torch.float64)
    filler = -1  # scored again as the last block, and not counted
    mine = torch.tensor(share_of_rank(list(range(len(blocks_NT))), FORWARD_BLOCKS, filler))
    for numbers_B in tqdm(
        mine.split(FORWARD_BLOCKS), "legacy protocol", disable=not progress, leave=False
    ):
        if stopped():
            return None
        blocks_BT = blocks_NT[numbers_B]
        ids_BT, targets_BT = blocks_BT[:, :-1].to(device), blocks_BT[:, 1:].to(device)
        nll_BT = model(ids_BT, targets_BT).token_nll_BT
        assert nll_BT is not None
        nll_BTK = nll_BT.cpu().double().unsqueeze(-1) * _kinds(blocks_BT)
        counted_B = numbers_B != filler
        sums_NK[numbers_B[counted_B]] = nll_BTK.sum(1)[counted_B]
    (total_NK,) = sum_over_ranks(sums_NK.numpy())
    return total_NK


def _kinds(blocks_NT: Tensor) -> Tensor:
    """One-hot kind of every target."""
    return F.one_hot(target_kinds(blocks_NT[:, 1:]), len(KINDS)).double()
