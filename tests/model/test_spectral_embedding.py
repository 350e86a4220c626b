"""Embeddings made of waves, and the factorised one beside them, against their definitions."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from references import assert_near, randomise
from sra_ds.config.model import (
    FactorisedEmbeddingConfig,
    HybridEmbeddingConfig,
    SpectralEmbeddingConfig,
)
from sra_ds.model.embeddings.factorised import FactorisedEmbedding
from sra_ds.model.embeddings.spectral import (
    HybridEmbedding,
    SpectralEmbedding,
    first_frequencies,
    wave_basis,
)
from sra_ds.model.init import initialise
from sra_ds.training.controllers.schedules import RatioRamp

pytestmark = pytest.mark.usefixtures("poisoned_memory")

VOCABULARY, WIDTH, WAVES = 501, 64, 8
POSITIONS = torch.zeros(1, VOCABULARY, dtype=torch.int64)
EVERY = torch.arange(VOCABULARY)[None]


def started(kind: str, **settings: Any) -> Any:
    """An embedding with its initial values."""
    classes = {
        "spectral": (SpectralEmbedding, SpectralEmbeddingConfig),
        "hybrid": (HybridEmbedding, HybridEmbeddingConfig),
        "factorised": (FactorisedEmbedding, FactorisedEmbeddingConfig),
    }
    module, config = classes[kind]
    if kind == "hybrid":
        settings = {"ramp": 0.0, **settings}
    sizes = {"rank": 2 * WAVES} if kind == "factorised" else {"harmonics": WAVES}
    embedding = module(config(dropout=0.0, **{**sizes, **settings}), VOCABULARY, WIDTH)
    holder = torch.nn.Module()
    holder.blocks = torch.nn.ModuleList([embedding])
    initialise(holder, 3)
    return embedding.double()


def vectors(embedding: Any) -> Tensor:
    return embedding(EVERY, POSITIONS)[0][0]


@pytest.mark.parametrize(("harmonics", "width"), [(1, 4), (8, 64), (31, 64), (64, 256), (13, 90)])
def test_waves_are_orthonormal_and_of_full_rank(harmonics: int, width: int) -> None:
    frequencies_H = first_frequencies(harmonics, width)
    assert frequencies_H.max() < width / 2 and len(set(frequencies_H.tolist())) == harmonics
    basis_MD = wave_basis(frequencies_H, width)
    identity = torch.eye(2 * harmonics, dtype=torch.float64)
    assert_near(basis_MD @ basis_MD.T, identity, 1e-12)


def test_the_published_frequencies_are_nearly_dependent() -> None:
    """Up to pi over [0, 1]: what whole numbers of periods avoid."""
    places_D = torch.linspace(0, 1, 256, dtype=torch.float64)
    angles = 2 * math.pi * torch.linspace(0.1, math.pi, 16, dtype=torch.float64)[:, None] * places_D
    singular = torch.linalg.svdvals(torch.cat([angles.sin(), angles.cos()]))
    assert int((singular > 1e-3 * singular[0]).sum()) == 12


@pytest.mark.parametrize("frequencies", ["fixed", "learnable"])
def test_cartesian_equals_polar_equals_the_explicit_sum(frequencies: str) -> None:
    cartesian = started("spectral", frequencies=frequencies)
    polar = started("spectral", frequencies=frequencies, coefficients="polar")
    x_VD = vectors(cartesian)
    assert_near(vectors(polar), x_VD, 1e-7)
    places_D = torch.arange(WIDTH, dtype=torch.float64) / WIDTH
    waves_HD = 2 * math.pi * first_frequencies(WAVES, WIDTH)[:, None] * places_D
    amplitude_VH, phase_VH = polar.amplitude_VH, polar.phase_VH
    for token in (0, 7, VOCABULARY - 1):
        summed = sum(
            amplitude_VH[token, h] * torch.sin(waves_HD[h] + phase_VH[token, h])
            for h in range(WAVES)
        )
        assert_near(math.sqrt(2 / WIDTH) * summed, x_VD[token], 1e-6)


def test_the_rank_is_twice_the_number_of_waves() -> None:
    for embedding in (started("spectral"), started("factorised")):
        assert int(torch.linalg.matrix_rank(vectors(embedding), atol=1e-5)) == 2 * WAVES


@pytest.mark.parametrize("coefficients", ["cartesian", "polar"])
@pytest.mark.parametrize("kind", ["spectral", "hybrid", "factorised"])
def test_vectors_start_with_deviation_0_02(kind: str, coefficients: str) -> None:
    settings = {} if kind == "factorised" else {"coefficients": coefficients}
    x_VD = vectors(started(kind, **settings))
    expected = 0.02 * (math.hypot(0.5, 0.5) if kind == "hybrid" else 1)
    assert float(x_VD.square().mean().sqrt()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("coefficients", ["cartesian", "polar"])
@pytest.mark.parametrize("frequencies", ["fixed", "learnable"])
@pytest.mark.parametrize("kind", ["spectral", "hybrid", "factorised"])
def test_tied_logits_are_products_with_the_vectors(
    kind: str, frequencies: str, coefficients: str
) -> None:
    settings = {"frequencies": frequencies, "coefficients": coefficients}
    embedding = started(kind, **({} if kind == "factorised" else settings))
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    h_ND = torch.randn(5, WIDTH, dtype=torch.float64)
    u_NU, weight_VU = embedding.output_factors(h_ND)
    assert u_NU.shape[1] == weight_VU.shape[1] == embedding.table_width
    assert_near(u_NU @ weight_VU.T, h_ND @ vectors(embedding).T, 1e-10)


def test_tied_parameters_are_all_there_are() -> None:
    for kind in ("spectral", "hybrid", "factorised"):
        embedding = randomise(started(kind))
        assert {id(p) for p in embedding.tied_parameters()} == {
            id(p) for p in embedding.parameters()
        }


def test_the_ratio_starts_where_the_recipe_says_and_follows_the_ramp() -> None:
    assert float(started("hybrid", ratio=0.3).ratio()) == pytest.approx(0.3)
    embedding = started("hybrid", ratio=0.3, ramp=0.2)
    assert float(embedding.ratio()) == 0
    controller = RatioRamp(embedding, steps=100)
    seen = []
    for step in range(100):
        controller.on_step_start(step)
        seen.append(float(embedding.ratio()))
    assert (
        seen[0] == 0 and seen[10] == pytest.approx(0.15) and seen[20:] == [pytest.approx(0.3)] * 80
    )


def test_the_ratio_never_falls_again() -> None:
    """Neither in a longer run that goes on nor in one that starts from trained weights."""
    embedding = started("hybrid", ratio=0.3, ramp=0.2)
    RatioRamp(embedding, steps=100).on_step_start(15)
    for longer, step in ((1000, 16), (1000, 160), (50, 0)):
        RatioRamp(embedding, steps=longer).on_step_start(step)
        assert float(embedding.ramp) == pytest.approx(max(0.75, step / longer / 0.2))
        embedding.ramp.clamp_(max=0.75)
    RatioRamp(embedding, steps=100).on_step_start(20)
    with torch.no_grad():
        embedding.mixing_logit.fill_(1.0)  # learned meanwhile
    RatioRamp(embedding, steps=1000).on_step_start(21)
    assert float(embedding.ratio()) == pytest.approx(torch.tensor(1.0).sigmoid().item())


def test_at_the_start_of_the_ramp_it_is_the_table_of_tokens() -> None:
    embedding = started("hybrid", ramp=0.2)
    RatioRamp(embedding, steps=10).on_step_start(0)
    assert torch.equal(vectors(embedding), embedding.weight[:, :WIDTH])


@pytest.mark.parametrize("ramp", [0.0, 0.5, 1.0])
def test_the_ratio_learns_when_the_ramp_is_over(ramp: float) -> None:
    embedding = started("hybrid")
    embedding.ramp.fill_(ramp)
    vectors(embedding).square().sum().backward()
    assert bool(embedding.mixing_logit.grad.any()) == (ramp == 1)


def test_no_ramp_means_the_ratio_from_the_first_step() -> None:
    embedding = started("hybrid", ramp=0.0)
    RatioRamp(embedding, steps=10).on_step_start(0)
    assert float(embedding.ratio()) == pytest.approx(0.5)


def test_facts_are_measured_and_change_nothing() -> None:
    embedding = started("hybrid", frequencies="learnable")
    before = {name: value.clone() for name, value in embedding.state_dict().items()}
    _, facts = embedding(EVERY, POSITIONS)
    assert all(torch.equal(value, before[name]) for name, value in embedding.state_dict().items())
    assert float(facts["ratio"]) == pytest.approx(0.5)
    assert float(facts["basis_condition"]) == pytest.approx(1, abs=1e-3)
    assert 0.9 < float(facts["spectrum_entropy"]) <= 1
    assert float(facts["token_rms"]) == pytest.approx(0.02, rel=0.05)
    assert float(facts["wave_rms"]) == pytest.approx(0.02, rel=0.05)
    assert 2 * WAVES < float(facts["effective_rank"]) < WIDTH
    spectral = started("spectral")
    assert float(spectral(EVERY, POSITIONS)[1]["effective_rank"]) < 2 * WAVES + 1
    with torch.no_grad():
        embedding.frequency_shift_H.normal_(0, 0.05)
    assert float(embedding(EVERY, POSITIONS)[1]["basis_condition"]) > 1.01


def test_spectrum_is_the_mean_amplitude_of_each_wave() -> None:
    embedding = started("spectral", coefficients="polar")
    assert_near(embedding.spectrum(), embedding.amplitude_VH.mean(0).float(), 1e-6)
    assert embedding.frequencies().tolist() == [3, 6, 9, 12, 15, 18, 21, 24]
