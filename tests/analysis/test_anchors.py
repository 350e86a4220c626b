"""Where anchors lie: rank, cosines, the nearest vocabulary, and the map."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, normalize

from references import randomise
from sra_ds.analysis.anchors import (
    AnchorSpace,
    anchor_spaces,
    effective_rank,
    geometry,
    nearest_tokens,
    neighbour_plane,
    principal_plane,
)
from sra_ds.config import Recipe
from sra_ds.model.language_model import build_model


def random_directions(count: int, width: int) -> torch.Tensor:
    return normalize(torch.randn(count, width), dim=-1)


@pytest.mark.parametrize("experts", [1, 7, 130])
def test_rank_counts_orthogonal_anchors_and_not_equal_ones(experts: int) -> None:
    """E orthogonal ones have rank E, E equal ones 1, two groups of equal ones 2."""
    orthogonal_ED = torch.linalg.qr(torch.randn(256, experts)).Q.T
    assert effective_rank(orthogonal_ED) == pytest.approx(experts, rel=1e-5)
    equal_ED = random_directions(1, 256).expand(experts, -1)
    assert effective_rank(equal_ED) == pytest.approx(1, abs=1e-3)
    groups_ED = orthogonal_ED[:1].repeat(6, 1)
    groups_ED[::2] = torch.eye(256)[3] - (torch.eye(256)[3] @ groups_ED[0]) * groups_ED[0]
    assert effective_rank(normalize(groups_ED, dim=-1)) == pytest.approx(2, abs=1e-3)


def test_rank_is_that_of_the_singular_values() -> None:
    """More anchors than dimensions, too."""
    for anchors_ED in (random_directions(9, 5), random_directions(5, 9)):
        singular = np.linalg.svd(anchors_ED.double().numpy(), compute_uv=False)
        shares = singular / singular.sum()
        expected = math.exp(-(shares * np.log(shares)).sum())
        assert effective_rank(anchors_ED) == pytest.approx(expected, rel=1e-5)


def test_geometry_is_measured_beside_random_directions() -> None:
    """Two equal anchors among random ones, by hand; anchors of one half-space are not random."""
    anchors_ED = random_directions(6, 64)
    anchors_ED[5] = anchors_ED[4]
    cosines = [float(anchors_ED[a] @ anchors_ED[b]) for a in range(6) for b in range(6) if a != b]
    found = geometry(anchors_ED)
    assert found["mean_cosine"].value == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found["mean_abs_cosine"].value == pytest.approx(np.abs(cosines).mean(), abs=1e-6)
    assert found["largest_cosine"].value == pytest.approx(1) and found["largest_cosine"].p == 0.01
    assert found["mean_abs_cosine"].chance == pytest.approx(math.sqrt(2 / (64 * math.pi)))
    for one in geometry(normalize(anchors_ED + 0.2, dim=-1)).values():
        assert one.p == 0.01
    random = geometry(random_directions(40, 64))
    assert all(one.p > 0.02 for one in random.values())
    close = random["mean_abs_cosine"]
    assert close.value == pytest.approx(close.chance, rel=0.05)
    assert close.null_mean == pytest.approx(close.chance, rel=0.02)
    assert geometry(random_directions(1, 8)) == {}


@pytest.mark.parametrize("family", ["moe-cosine", "moe-linear"])
def test_the_vocabulary_is_what_the_router_sees_without_context(
    family: str, tiny_recipe: Callable[..., Recipe]
) -> None:
    """The layer's own norm of the embedding; the anchors, or the linear rows that stand for them."""
    model = build_model(tiny_recipe(family)).eval()
    randomise(model)
    spaces = anchor_spaces(model, 100)
    assert len(spaces) == 2
    for space, block, router in zip(spaces, model.blocks, model.routers(), strict=True):
        norm = block.channel_norm
        seen_VD = layer_norm(model.embedding.weight[:100], (32,), norm.weight, norm.bias)
        rows_ED = router.anchors if family == "moe-cosine" else router.weight
        torch.testing.assert_close(space.vocabulary_VD, normalize(seen_VD, dim=-1))
        torch.testing.assert_close(space.anchors_ED, normalize(rows_ED, dim=-1))
        ids, cosines = nearest_tokens(space, 7)
        for anchor_D, own, close in zip(space.anchors_ED, ids, cosines, strict=True):
            every = (space.vocabulary_VD @ anchor_D).tolist()
            assert own == sorted(range(100), key=lambda v, every=every: -every[v])[:7]
            np.testing.assert_allclose(close, [every[v] for v in own], atol=1e-6)


def test_a_router_without_anchors_has_no_space(tiny_recipe: Callable[..., Recipe]) -> None:
    assert anchor_spaces(build_model(tiny_recipe("moe-hash")).eval(), 100) == []


def test_the_plane_keeps_what_lies_in_it() -> None:
    """Vectors that differ in two directions alone: all of the variance, and every distance."""
    plane_2D = torch.linalg.qr(torch.randn(16, 2)).Q.T
    anchors_ED = torch.randn(5, 2) @ plane_2D + 3
    tokens_VD = torch.randn(63, 2) @ plane_2D - 7
    shown = np.array([0, 5, 62])
    anchors_E2, tokens_S2, note = principal_plane(AnchorSpace(anchors_ED, tokens_VD), shown)
    assert note == "100% of the variance"
    for flat, whole in ((anchors_E2, anchors_ED), (tokens_S2, tokens_VD[shown])):
        distances = torch.cdist(torch.from_numpy(flat), torch.from_numpy(flat))
        torch.testing.assert_close(distances.float(), torch.cdist(whole, whole), atol=1e-4, rtol=0)
        np.testing.assert_allclose(flat.mean(0), 0, atol=1e-5)


def test_the_plane_says_how_much_it_leaves_out() -> None:
    """Variances of 9, 4 and 1 in three directions."""
    cross_ED = torch.diag(torch.tensor([3.0, 2.0, 1.0])).repeat(2, 1) * torch.tensor(
        [[1.0]] * 3 + [[-1.0]] * 3
    )
    *_, note = principal_plane(AnchorSpace(cross_ED, 5 * cross_ED), np.arange(6))
    assert note == "93% of the variance"


def test_neighbours_stay_neighbours_in_the_other_map() -> None:
    """UMAP of two groups of tokens with an anchor each; the same whenever it is asked for."""
    directions_2D = torch.eye(16)[:2]
    tokens_VD = normalize(directions_2D.repeat(20, 1) + 0.05 * torch.randn(40, 16), dim=-1)
    space = AnchorSpace(directions_2D, tokens_VD)
    anchors_22, tokens_S2, note = neighbour_plane(space, np.arange(40))
    distances_2S = np.linalg.norm(anchors_22[:, None] - tokens_S2[None], axis=-1)
    assert distances_2S.argmin(0).tolist() == [0, 1] * 20 and note.startswith("UMAP")
    np.testing.assert_array_equal(neighbour_plane(space, np.arange(40))[1], tokens_S2)
