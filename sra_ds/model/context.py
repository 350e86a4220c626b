"""What every part of the model may know about a batch besides the vectors it transforms.

Letters: B sequences, T new positions, S >= T positions visible to them (cached ones first).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DecodingState:
    """What incremental decoding keeps: documents and validity of the S past positions, and one
    dictionary of tensors per block, owned by its mixer and its memory."""

    def __init__(self, layers: int) -> None:
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(layers)]
        self.document_ids_BS: Tensor | None = None
        self.valid_BS: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions decoded so far."""
        return 0 if self.document_ids_BS is None else self.document_ids_BS.shape[1]

    def extend(self, document_ids_BT: Tensor, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions; returns documents and validity of all of them."""
        if self.document_ids_BS is not None and self.valid_BS is not None:
            document_ids_BT = torch.cat([self.document_ids_BS, document_ids_BT], 1)
            valid_BT = torch.cat([self.valid_BS, valid_BT], 1)
        self.document_ids_BS, self.valid_BS = document_ids_BT, valid_BT
        return document_ids_BT, valid_BT


class Context(NamedTuple):
    """Facts of a batch. `visible_B1TS` None means causal and nothing else."""

    ids_BT: Tensor
    positions_T: Tensor
    """Places in the window, from the first one decoded on."""
    document_positions_BT: Tensor
    """Real tokens of the same document before this one; 0 where a document starts."""
    valid_BT: Tensor | None
    visible_B1TS: Tensor | None
    keep_scores: bool = False
    recompute: bool = False
    mixed_BTD: Tensor | None = None
    """What the mixer of this block added; for its channel."""

    @property
    def starts_BT(self) -> Tensor:
        """Where a document starts."""
        starts_BT = self.document_positions_BT == 0
        return starts_BT if self.valid_BT is None else starts_BT & self.valid_BT


def document_positions(document_ids_BS: Tensor | None, valid_BS: Tensor) -> Tensor:
    """Real tokens of the same document before each position, B x S; padding counts nothing."""
    counted_BS = valid_BS.cumsum(-1)
    starts_BS = torch.zeros_like(valid_BS)
    starts_BS[:, 0] = True
    if document_ids_BS is not None:
        starts_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    before_BS = ((counted_BS - valid_BS.long()) * starts_BS).cummax(-1).values
    return (counted_BS - 1 - before_BS).clamp(min=0)


def visible_positions(
    document_ids_BS: Tensor | None,
    valid_BS: Tensor | None,
    queries: int,
    length: int,
    device: torch.device,
) -> Tensor:
    """Boolean B x 1 x T x S: position s may be seen from t. Causal, same document, not padding; a
    position always sees itself, so that padding has something to attend to."""
    rows_T = torch.arange(length - queries, length, device=device)
    columns_S = torch.arange(length, device=device)
    visible = (columns_S <= rows_T[:, None])[None]
    if document_ids_BS is not None:
        visible = visible & (document_ids_BS[:, -queries:, None] == document_ids_BS[:, None, :])
    if valid_BS is not None:
        visible = visible & valid_BS[:, None, :]
    return (visible | (columns_S == rows_T[:, None])[None]).unsqueeze(1)
