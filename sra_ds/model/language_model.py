"""The language model all families share: embedding -> blocks[mixer, channel] -> norm -> head.

Letters: B sequences, T positions, D width, V vocabulary, L layers.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sra_ds.config.model import ModelConfig
from sra_ds.config.recipe import Recipe
from sra_ds.model.block import Block
from sra_ds.model.context import Context, DecodingState, document_positions, visible_positions
from sra_ds.model.embeddings import EMBEDDINGS
from sra_ds.model.facts import Collected, Facts, Halting, collect
from sra_ds.model.heads import HEADS
from sra_ds.model.init import initialise
from sra_ds.model.memories.fast import PersistentMemory
from sra_ds.moe.layer import MoELayer
from sra_ds.moe.placement import WHOLE, Placement
from sra_ds.moe.routing import Routing
from sra_ds.ops.linear_cross_entropy import IGNORED


class ModelOutput(NamedTuple):
    """Everything a forward pass found out; losses and metrics are functions of it. The first fields are
    those of `Collected`."""

    routings: list[Routing]
    facts: dict[str, Tensor]
    haltings: list[Halting]
    memory_states_HCC: list[Tensor]
    saturations: list[Tensor]
    penalties: dict[str, list[Tensor]]
    loss_sum: Tensor | None = None
    """Sum of -log p over the counted targets; like the next three, only with targets."""
    token_count: Tensor | None = None
    """Number of counted targets."""
    token_nll_BT: Tensor | None = None
    """-log p of each target, 0 where ignored; no gradient."""
    correct_BT: Tensor | None = None
    """Whether the target has the largest logit; only without gradient."""
    logits: Tensor | None = None
    """B x T x V, only without targets."""

    @property
    def anchor_grams(self) -> list[Tensor]:
        """Cosines between the anchors of each layer that has anchors, E x E."""
        return [r.anchor_gram_EE for r in self.routings if r.anchor_gram_EE is not None]


class LanguageModel(nn.Module):
    """Built without values; `build_model` initialises it."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.recompute = False
        self.embedding = EMBEDDINGS[type(config.embedding)](
            config.embedding, vocab_size, config.width
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)
        self.head = HEADS[type(config.head)](config.head, self.embedding.table_width)

    def forward(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
        state: DecodingState | None = None,
        keep_scores: bool = False,
    ) -> ModelOutput:
        """Logits, or with targets (-100 = not counted) the summed loss.

        `valid_BT` False marks padding: invisible to other positions and to routing statistics. With a
        `state` the T ids continue the sequences decoded before.
        """
        h_BTD, found = self._encode(ids_BT, document_ids_BT, valid_BT, state, keep_scores)
        targets_N = None if targets_BT is None else targets_BT.flatten()
        scored = self.head(h_BTD.flatten(0, 1), self.embedding, targets_N)
        collected = collect({**found, "head": scored.facts or {}})
        if targets_BT is None:
            return ModelOutput(*collected, logits=scored.logits_NV.view(*ids_BT.shape, -1))
        return ModelOutput(
            *collected,
            loss_sum=scored.loss_sum,
            token_count=(targets_BT != IGNORED).sum(),
            token_nll_BT=scored.nll_N.view_as(ids_BT),
            correct_BT=None if scored.correct_N is None else scored.correct_N.view_as(ids_BT),
        )

    def encode(
        self,
        ids_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
        state: DecodingState | None = None,
        keep_scores: bool = False,
    ) -> tuple[Tensor, Collected]:
        """What the head is given, h_BTD, and what the parts below it found out."""
        h_BTD, found = self._encode(ids_BT, document_ids_BT, valid_BT, state, keep_scores)
        return h_BTD, collect(found)

    def _encode(
        self,
        ids_BT: Tensor,
        document_ids_BT: Tensor | None,
        valid_BT: Tensor | None,
        state: DecodingState | None,
        keep_scores: bool,
    ) -> tuple[Tensor, dict[str, Facts]]:
        """h_BTD and the facts of the parts below the head, by where they come from."""
        context = self._context(ids_BT, document_ids_BT, valid_BT, state, keep_scores)
        found: dict[str, Facts] = {}
        x_BTD, found["embedding"] = self.embedding(ids_BT, context.document_positions_BT)
        for number, block in enumerate(self.blocks):
            cache = None if state is None else state.layers[number]
            x_BTD, found[f"layer{number}"] = block(x_BTD, context, cache)
        return self.final_norm(x_BTD), found

    def new_state(self) -> DecodingState:
        """An empty state for incremental decoding."""
        return DecodingState(len(self.blocks))

    def routed_layers(self) -> list[MoELayer]:
        """The routed layers, in order."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def routers(self) -> list[Any]:
        """The router of each routed layer, in order."""
        return [layer.router for layer in self.routed_layers()]

    def persistent_memories(self) -> list[PersistentMemory]:
        """The memories that outlive documents, in order of the layers."""
        return [module for module in self.modules() if isinstance(module, PersistentMemory)]

    def _context(
        self,
        ids_BT: Tensor,
        document_ids_BT: Tensor | None,
        valid_BT: Tensor | None,
        state: DecodingState | None,
        keep_scores: bool,
    ) -> Context:
        length = ids_BT.shape[1]
        past = 0 if state is None else state.length
        positions_T = torch.arange(past, past + length, device=ids_BT.device)
        documents = document_ids_BT if self.config.document_boundaries else None
        visible_valid = valid_BT
        if state is not None:
            new_documents = torch.zeros_like(ids_BT) if documents is None else documents
            new_valid = torch.ones_like(ids_BT, dtype=torch.bool) if valid_BT is None else valid_BT
            documents, visible_valid = state.extend(new_documents, new_valid)
        visible = None
        if documents is not None or visible_valid is not None:
            visible = visible_positions(
                documents, visible_valid, length, past + length, ids_BT.device
            )
        every = torch.ones_like(ids_BT, dtype=torch.bool)
        counted = every if visible_valid is None else visible_valid
        positions_BT = document_positions(documents, counted)[:, -length:]
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        return Context(ids_BT, positions_T, positions_BT, valid_BT, visible, keep_scores, recompute)


def build_model(
    recipe: Recipe, device: str | torch.device = "cpu", placement: Placement = WHOLE
) -> LanguageModel:
    """The recipe's model with its initial weights, a function of `training.seed` alone; of the experts
    only those placed on this process ever exist."""
    with torch.device("meta"):
        model = LanguageModel(recipe.model, recipe.data.tokenizer.vocab_size)
        if placement != WHOLE:
            for layer in model.routed_layers():
                layer.place(placement)
    if str(device) == "meta":
        return model
    model.to_empty(device=device)
    initialise(model, recipe.training.seed)
    return model
