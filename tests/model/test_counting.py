"""T12: parameter and FLOP counts against closed forms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sra_ds.config import Recipe
from sra_ds.model.channels import CHANNELS
from sra_ds.model.counting import count_parameters
from sra_ds.model.embeddings import EMBEDDINGS
from sra_ds.model.flops import OWN_WORK, flops_per_token
from sra_ds.model.heads import HEADS
from sra_ds.model.language_model import build_model
from sra_ds.model.memories import MEMORIES
from sra_ds.model.mixers import MIXERS

Builder = Callable[..., Recipe]
VOCABULARY, WIDTH, LAYERS, EXPERTS, TOP_K, HIDDEN = 257, 32, 2, 4, 2, 16
GELU = 2 * WIDTH * HIDDEN + HIDDEN + WIDTH
SWIGLU = 3 * WIDTH * HIDDEN
RANK = 4
GRAPH = EXPERTS**2 + (WIDTH + 1) + WIDTH + 3 * WIDTH * RANK
HYPERGRAPH = 2 * WIDTH * RANK
BLOCK = 4 * WIDTH * WIDTH + 4 * WIDTH + 2 * WIDTH + GELU
LIVE = sum((i - j) % 3 == 0 or (i - j) % 5 == 0 for i in range(HIDDEN) for j in range(WIDTH))
FEED_FORWARDS = {
    "moe-cosine": (EXPERTS * GELU, TOP_K * GELU, EXPERTS * WIDTH + 1),
    "moe-linear": (EXPERTS * GELU, TOP_K * GELU, EXPERTS * WIDTH + EXPERTS),
    "moe-hash": (EXPERTS * GELU, TOP_K * GELU, 0),
    "dense": (GELU, GELU, 0),
    "moe-swiglu-shared": (
        (EXPERTS + 1) * SWIGLU,
        (TOP_K + 1) * SWIGLU,
        EXPERTS * WIDTH + EXPERTS,
    ),
    "moe-gnn": (EXPERTS * GELU + 2 * GRAPH, 3 * GELU + 2 * GRAPH, EXPERTS * WIDTH),
    "moe-hgnn": (
        EXPERTS * GELU + 2 * (HYPERGRAPH + 6 + 6 * WIDTH),
        3 * GELU + 2 * (HYPERGRAPH + 6 + 6 * WIDTH),
        EXPERTS * WIDTH + 1,
    ),
    "moe-learned-hyperedges": (
        (EXPERTS + 1) * GELU + HYPERGRAPH + 6 + 6 * EXPERTS,
        (TOP_K + 1) * GELU + HYPERGRAPH + 6 + 6 * EXPERTS,
        EXPERTS * WIDTH + 1,
    ),
    "moe-block": (EXPERTS * BLOCK + 2 * GRAPH, EXPERTS * BLOCK + 2 * GRAPH, EXPERTS * WIDTH + 1),
    "moe-ghost": (
        (EXPERTS + 1) * GELU + HYPERGRAPH + 10,  # pairs, those with the ghost among them
        TOP_K * GELU + HYPERGRAPH + 10,
        (EXPERTS + 1) * WIDTH + 1,
    ),
    "resonance": (2 * LIVE + HIDDEN + WIDTH, 2 * LIVE + HIDDEN + WIDTH, 0),
    "resonance-moe": (EXPERTS * GELU, TOP_K * GELU, EXPERTS * WIDTH + 1),
    "resonance-blocks": (3 * LIVE, 3 * LIVE, 0),
    "spectral": (GELU, GELU, 0),
    "spectral-hybrid": (EXPERTS * GELU, TOP_K * GELU, EXPERTS * WIDTH + 1),
    "spectral-choice": (GELU, GELU, 0),
    "spectral-controls": (GELU, GELU, 0),
}
TABLE, SUBSPACES = 24, 2 * (3 + 5)
PRIME_HILBERT = (
    (VOCABULARY + 2 * WIDTH + SUBSPACES) * TABLE  # table, skip, head map, projections
    + (SUBSPACES + 1) * WIDTH  # out
    + 2 * 2  # strengths of tokens and positions
)
PRE_MANIFEST = TABLE**2 + 2
WAVES = 6
EMBEDDING_HEAD = {
    "resonance": PRIME_HILBERT + PRE_MANIFEST,
    "spectral": VOCABULARY * 2 * WAVES,
    "spectral-hybrid": VOCABULARY * (WIDTH + 2 * WAVES) + WAVES + 1,  # and frequencies, the ratio
    "spectral-controls": (VOCABULARY + WIDTH) * 12,
}
RETRIEVAL = 2 * ((WIDTH // 2) ** 2 + 2)
MEMORY = {
    "resonance": WIDTH * 8 + 8 * 8 + 1 + 8 * 6 + (6 * 3 + 3) + 2 * 3 * WIDTH,
    "resonance-moe": (3 + 1) * WIDTH * 16 + WIDTH * 2 + 2 + 2,
    "resonance-blocks": (3 + 1) * WIDTH * 16 + WIDTH * 2 + 2 + 2,
}
ATTENTION = 4 * WIDTH * WIDTH + 4 * WIDTH
OUT = WIDTH * WIDTH + WIDTH
OF_A_MIXER = {
    "resonance": ATTENTION + RETRIEVAL,
    "resonance-moe": ATTENTION + RETRIEVAL,
    "resonance-blocks": ATTENTION + RETRIEVAL,
    "spectral": (WIDTH + 1) * 3 * WIDTH + OUT + 4,  # gates of 3 bands, and 4 learned taps
    "spectral-hybrid": ATTENTION + (WIDTH + 1) * 4,
    "spectral-choice": (WIDTH + 1) * 3 * WIDTH + OUT + 2,  # and logits of 2 families
    "spectral-controls": 8 * WIDTH + 2 * OUT,
}
NORMS = 4 * WIDTH * LAYERS + 2 * WIDTH


def test_t12_counts_equal_the_closed_form(tiny_recipe: Builder, family: str) -> None:
    total_experts, active_experts, router = FEED_FORWARDS[family]
    counts = count_parameters(build_model(tiny_recipe(family), "meta"))
    by_part = {
        "embedding_head": EMBEDDING_HEAD.get(family, VOCABULARY * WIDTH),
        "attention": LAYERS * OF_A_MIXER.get(family, ATTENTION),
        "experts": LAYERS * total_experts,
        "memory": LAYERS * MEMORY.get(family, 0),
        "router": LAYERS * router,
        "norms": NORMS + 2 * SUBSPACES * (family == "resonance"),
    }
    active_by_part = {**by_part, "experts": LAYERS * active_experts}
    assert counts["total_by_part"] == by_part
    assert counts["active_by_part"] == active_by_part
    assert counts["total"] == sum(by_part.values())
    assert counts["active_with_anchors"] == sum(active_by_part.values())
    assert counts["active"] == sum(active_by_part.values()) - LAYERS * router
    assert counts["feed_forward_and_router"] == LAYERS * (active_experts + router)


def test_t12_total_is_the_number_of_stored_weights(tiny_recipe: Builder, family: str) -> None:
    model = build_model(tiny_recipe(family))
    stored = sum(p.numel() for p in model.parameters())
    dead = sum((~mask).sum() for name, mask in model.named_buffers() if name.endswith("mask"))
    assert count_parameters(model)["total"] == stored - dead
    assert (dead > 0) == (family == "resonance")


@pytest.mark.parametrize("router", ["cosine", "random"])
def test_t12_the_published_model_has_the_published_size(tiny_recipe: Builder, router: str) -> None:
    temperature = {"temperature": "none"} if router == "cosine" else {}
    overlay: dict[str, Any] = {
        "data": {"tokenizer": {"vocab_size": 32_000}},
        "model": {
            "width": 512,
            "layers": 4,
            "mixer": {"kind": "attention", "heads": 8},
            "channel": {
                "experts": 128,
                "expert": {"kind": "gelu", "hidden": 1024},
                "router": {"kind": router, **temperature},
            },
        },
    }
    counts = count_parameters(build_model(tiny_recipe("moe-cosine", overlay), "meta"))
    anchors = 4 * 128 * 512 if router == "cosine" else 0
    assert counts["active_by_part"]["router"] == anchors
    assert counts["active"] / 1e6 == pytest.approx(29.0, abs=0.05)
    assert counts["active_with_anchors"] == counts["active"] + anchors
    if router == "cosine":
        assert counts["total"] / 1e6 == pytest.approx(558.5, abs=0.05)
        assert counts["active_with_anchors"] / 1e6 == pytest.approx(29.3, abs=0.05)
        assert counts["feed_forward_and_router"] / 1e6 == pytest.approx(8.66, abs=0.005)


@pytest.mark.parametrize("length", [16, 256])
def test_t12_flops_are_six_per_active_weight_and_half_the_attention_square(
    tiny_recipe: Builder, family: str, length: int
) -> None:
    model = build_model(tiny_recipe(family), "meta")
    # per layer and token: scores and their use, 2 T D multiply-adds, half of them masked, 3 passes
    attention = LAYERS * (2 * length * WIDTH) * 2 / 2 * 3
    expected = 6 * count_parameters(model)["active_with_anchors"]
    if family == "spectral-hybrid":  # of four bands one keeps all keys, one a 4th, two an 8th
        expected += attention * 1.5 / 4 + LAYERS * 6 * 2 * WIDTH * 2 * (1 + 3 / 4 + 2 / 4)
        expected += 2 * 6 * 2 * WAVES * WIDTH
    elif family == "spectral":  # two levels of 4 taps
        expected += LAYERS * 6 * 4 * 2 * WIDTH + 2 * 4 * 2 * WAVES * WIDTH
    elif family == "spectral-choice":
        expected += LAYERS * 6 * 4 * 2 * WIDTH
    elif family != "spectral-controls":
        expected += attention
    if family.startswith("resonance"):  # 3 iterations, whose retrieval map is used twice
        expected += 2 * attention + LAYERS * 6 * 2 * (WIDTH // 2) ** 2
    if family in (
        "resonance-moe",
        "resonance-blocks",
    ):  # recall, write and read of 2 heads of 8 x 8
        expected += LAYERS * 6 * 3 * 2 * 8**2
    if family == "resonance":  # the table once more, forwards only; 3 of 8 slots are read
        expected += 2 * VOCABULARY * TABLE - LAYERS * 6 * (8 - 3) * 6
    if family == "moe-block":
        expected += EXPERTS * attention
    maps = {
        "moe-gnn": (3, 2 * (2 * WIDTH + 3 * WIDTH * RANK)),
        "moe-hgnn": (3, 2 * (HYPERGRAPH + 6 * WIDTH)),
        "moe-learned-hyperedges": (2, HYPERGRAPH),
        "moe-block": (4, 2 * (2 * WIDTH + 3 * WIDTH * RANK)),
        "moe-ghost": (2, HYPERGRAPH),
    }
    if family in maps:  # once for each expert of a token; the first is among the active weights
        top_k, weights = maps[family]
        expected += LAYERS * 6 * (top_k - 1) * weights
    assert flops_per_token(model, length) == expected


@pytest.mark.parametrize(
    "part", [p for table in (EMBEDDINGS, MIXERS, CHANNELS, MEMORIES, HEADS) for p in table.values()],
    ids=lambda part: part.__name__,
)  # fmt: skip
def test_of_every_part_it_is_said_what_it_costs(part: type[torch.nn.Module]) -> None:
    """Besides its parameters, be it nothing: a part that is forgotten would be counted too low."""
    assert issubclass(part, tuple(OWN_WORK))


def test_building_on_meta_allocates_nothing(tiny_recipe: Builder) -> None:
    model = build_model(
        tiny_recipe("moe-cosine", {"model": {"width": 65_536, "layers": 1}}), "meta"
    )
    assert {p.device.type for p in model.parameters()} == {"meta"}
