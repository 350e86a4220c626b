"""The prime Hilbert embedding: position codes, subspaces, the tied head."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from references import randomise
from sra_ds.config import Recipe
from sra_ds.config.model import PrimeHilbertEmbeddingConfig
from sra_ds.model.context import document_positions
from sra_ds.model.embeddings.prime_hilbert import (
    PrimeHilbertEmbedding,
    position_codes,
)
from sra_ds.model.embeddings.rank import effective_rank
from sra_ds.model.language_model import build_model

Builder = Callable[..., Recipe]
VOCABULARY, WIDTH = 50, 12
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


def embedding(**settings: Any) -> PrimeHilbertEmbedding:
    settings = {"table_width": 9, "primes": (3, 5), "copies": 2, "dropout": 0.0, **settings}
    config = PrimeHilbertEmbeddingConfig(**settings)
    return randomise(PrimeHilbertEmbedding(config, VOCABULARY, WIDTH)).double().eval()


@pytest.mark.parametrize("prime", PRIMES)
def test_codes_are_orthonormal_over_one_period(prime: int) -> None:
    codes = position_codes(prime)
    near = {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(codes @ codes.T, torch.eye(prime, dtype=torch.float64), **near)
    torch.testing.assert_close(codes.T @ codes, torch.eye(prime, dtype=torch.float64), **near)


def test_a_code_is_the_real_fourier_basis() -> None:
    expected = [1 / math.sqrt(5)]
    for wave in (math.cos, math.sin):
        expected += [math.sqrt(2 / 5) * wave(2 * math.pi * k * 3 / 5) for k in (1, 2)]
    assert position_codes(5)[3].tolist() == pytest.approx(expected, abs=1e-15)


def test_positions_are_told_apart_up_to_the_product_of_the_primes_and_not_beyond() -> None:
    def joint(n: int, primes: tuple[int, ...]) -> Tensor:
        return torch.cat([position_codes(p)[n % p] for p in primes])

    codes = torch.stack([joint(n, (3, 5, 7)) for n in range(105)])
    assert torch.cdist(codes, codes)[~torch.eye(105, dtype=torch.bool)].min() > 0.5
    for n, prime in itertools.product((0, 4, 17), (3, 5, 7)):
        assert torch.equal(
            position_codes(prime)[n % prime], position_codes(prime)[(n + 105) % prime]
        )


def test_it_equals_the_definition_token_by_token() -> None:
    model = embedding()
    ids_BT, positions_BT = torch.randint(VOCABULARY, (2, 6)), torch.randint(40, (2, 6))
    x_BTD, _ = model(ids_BT, positions_BT)
    for b, t in itertools.product(range(2), range(6)):
        u_U = model.weight[ids_BT[b, t]] / 0.02
        parts, begin = [], 0
        for number, prime in enumerate((3, 5)):
            projection = model.subspaces_US[:, begin : begin + 2 * prime]
            begin += 2 * prime
            code = position_codes(prime)[int(positions_BT[b, t]) % prime]
            z = model.token_strength[number] * (u_U @ projection)
            z = z + model.position_strength[number] * torch.cat([code, code])
            norm = model.subspace_norms[number]
            z = (z - z.mean()) / (z.var(correction=0) + norm.eps).sqrt()
            parts.append(z * norm.weight + norm.bias)
        expected_D = model.out.weight @ torch.cat(parts) + model.out.bias
        expected_D = expected_D + model.skip.weight @ u_U
        torch.testing.assert_close(x_BTD[b, t], expected_D, rtol=1e-10, atol=1e-10)


def test_subspaces_start_orthonormal_each(tiny_recipe: Builder) -> None:
    model = build_model(tiny_recipe("resonance"))
    parts = model.embedding.subspaces_US.split([6, 10], 1)
    for part in parts:
        torch.testing.assert_close(part.T @ part, torch.eye(part.shape[1]), rtol=0, atol=1e-5)
    assert model.embedding.position_strength.tolist() == pytest.approx([0.1, 0.1])


def test_tied_logits_are_the_factors_product_and_know_no_position() -> None:
    model, h_ND = embedding(), torch.randn(4, WIDTH, dtype=torch.float64)
    inner_NU, weight_VU = model.output_factors(h_ND)
    expected_NV = torch.einsum("nd,ud,vu->nv", h_ND, model.head_map_UD, model.weight)
    torch.testing.assert_close(inner_NU @ weight_VU.T, expected_NV)
    assert inner_NU.shape == (4, model.table_width)


@pytest.mark.parametrize("token_skip", [False, True])
def test_rank_of_the_vocabulary_is_the_subspaces_or_the_width(token_skip: bool) -> None:
    model = embedding(table_width=9, primes=(3,), copies=1, token_skip=token_skip)
    ids_BT = torch.arange(VOCABULARY)[None]
    x_VD = model(ids_BT, torch.zeros_like(ids_BT))[0][0]
    centred_VD = x_VD - x_VD.mean(0)
    # a norm's output lies on a sphere in p - 1 dimensions; the skip adds up to `table_width`
    rank = int(torch.linalg.matrix_rank(centred_VD, rtol=1e-9))
    assert rank == (2 + 9 if token_skip else 2)


def test_effective_rank_of_known_spectra() -> None:
    rows = torch.eye(6, dtype=torch.float64)
    both = torch.cat([rows, -rows])
    assert float(effective_rank(both)) == pytest.approx(6)
    line = torch.outer(torch.randn(20, dtype=torch.float64), torch.randn(6, dtype=torch.float64))
    assert float(effective_rank(line)) == pytest.approx(1)


def test_facts_are_the_shares_of_the_primes() -> None:
    model = embedding()
    ids_BT = torch.randint(VOCABULARY, (2, 6))
    facts = model(ids_BT, torch.zeros_like(ids_BT))[1]
    z_BTS = model.weight[ids_BT] @ model.subspaces_US
    own = [
        float((model.token_strength[n] * part).square().sum())
        for n, part in enumerate(z_BTS.split([6, 10], -1))
    ]
    assert float(facts["share_3"]) == pytest.approx(own[0] / sum(own))
    assert float(facts["share_3"] + facts["share_5"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("documents", "valid", "expected"),
    [
        ([0, 0, 1, 1, 1, 2], None, [0, 1, 0, 1, 2, 0]),
        (None, [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 2, 3]),
        ([0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1], [0, 0, 1, 0, 0, 1]),
        ([4, 4, 7, 7, 4, 4], None, [0, 1, 0, 1, 0, 1]),
    ],
)
def test_positions_count_real_tokens_of_the_document(documents, valid, expected) -> None:
    length = len(expected)
    valid_BT = torch.tensor([valid or [1] * length], dtype=torch.bool)
    ids_BT = None if documents is None else torch.tensor([documents])
    assert document_positions(ids_BT, valid_BT).tolist() == [expected]
