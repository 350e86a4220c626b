"""Attention and rotary positions against loops."""

import pytest
import torch
from torch import Tensor

from references import attention_loop, randomise, rotate_loop
from sra_ds.config.model import AttentionConfig
from sra_ds.model.context import Context, DecodingState, visible_positions
from sra_ds.model.mixers.attention import Attention, rotary_angles, rotate

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HEADS, CHANNELS, THETA = 2, 6, 100.0
WIDTH = HEADS * CHANNELS


def attention(dropout: float = 0.0) -> Attention:
    config = AttentionConfig(heads=HEADS, rope_theta=THETA, dropout=dropout)
    return randomise(Attention(config, WIDTH)).double().eval()


def context(length: int, visible: Tensor | None = None, past: int = 0) -> Context:
    ids_BT = torch.zeros(1, length, dtype=torch.int64)
    positions_T = torch.arange(past, past + length)
    return Context(ids_BT, positions_T, positions_T.expand_as(ids_BT), None, visible)


def vectors(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 7, 20])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_equals_a_loop_over_heads_queries_and_keys(length: int, documents: bool) -> None:
    layer, x_BTD = attention(), vectors(2, length)
    doc_BT = (torch.rand(2, length) < 0.3).cumsum(-1)
    visible = visible_positions(doc_BT, None, length, length, x_BTD.device) if documents else None
    y_BTD, facts = layer(x_BTD, context(length, visible))
    rows = []
    for x_TD, doc_T in zip(x_BTD, doc_BT.tolist(), strict=True):
        q_TD, k_TD, v_TD = layer.qkv(x_TD).split(WIDTH, -1)

        def seen(t: int, s: int, doc_T: list[int] = doc_T) -> bool:
            return s <= t and (not documents or doc_T[s] == doc_T[t])

        heads = []
        for head in range(HEADS):
            part = slice(head * CHANNELS, (head + 1) * CHANNELS)
            q_TC = rotate_loop(q_TD[:, part], list(range(length)), THETA)
            k_TC = rotate_loop(k_TD[:, part], list(range(length)), THETA)
            heads.append(attention_loop(q_TC, k_TC, v_TD[:, part], seen))
        rows.append(layer.out(torch.cat(heads, -1)))
    assert facts == {}
    torch.testing.assert_close(y_BTD, torch.stack(rows), rtol=1e-10, atol=1e-10)
    if documents:
        assert not torch.allclose(y_BTD, layer(x_BTD, context(length))[0]) or length == 1


def test_the_causal_path_equals_the_causal_mask() -> None:
    layer, x_BTD = attention(), vectors(2, 20)
    mask = torch.ones(20, 20, dtype=torch.bool).tril().expand(2, 1, 20, 20)
    fast_BTD, _ = layer(x_BTD, context(20))
    masked_BTD, _ = layer(x_BTD, context(20, mask))
    torch.testing.assert_close(fast_BTD, masked_BTD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [[1] * 9, [4, 5], [1, 7, 1], [8, 1]], ids=str)
def test_cached_chunks_equal_one_pass(sizes: list[int]) -> None:
    layer, x_BTD = attention(), vectors(2, 9)
    expected_BTD, _ = layer(x_BTD, context(9))
    cache: dict[str, Tensor] = {}
    parts, past = [], 0
    for size in sizes:
        visible = visible_positions(None, None, size, past + size, x_BTD.device)
        chunk_BTD = x_BTD[:, past : past + size]
        parts.append(layer(chunk_BTD, context(size, visible, past), cache)[0])
        past += size
    assert cache["k"].shape == cache["v"].shape == (2, HEADS, 9, CHANNELS)
    torch.testing.assert_close(torch.cat(parts, 1), expected_BTD, rtol=1e-12, atol=1e-12)


def test_rotation_equals_complex_multiplication() -> None:
    x_TC = torch.randn(7, CHANNELS, dtype=torch.float64)
    positions = [0, 1, 2, 3, 100, 255, 4000]
    cos_TC, sin_TC = rotary_angles(torch.tensor(positions), CHANNELS, THETA)
    turned_TC = rotate(x_TC, cos_TC, sin_TC)
    expected_TC = torch.cat(
        [rotate_loop(x_TC[i : i + 1], [p], THETA) for i, p in enumerate(positions)]
    )
    torch.testing.assert_close(turned_TC, expected_TC, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(turned_TC.norm(dim=-1), x_TC.norm(dim=-1), rtol=1e-12, atol=1e-12)
    assert torch.equal(turned_TC[0], x_TC[0])


def test_scores_depend_on_the_distance_alone() -> None:
    q_C, k_C = torch.randn(2, 1, CHANNELS, dtype=torch.float64)

    def score(t: int, s: int) -> Tensor:
        cos_TC, sin_TC = rotary_angles(torch.tensor([t, s]), CHANNELS, THETA)
        q, k = rotate(torch.cat([q_C, k_C]), cos_TC, sin_TC)
        return q @ k

    torch.testing.assert_close(score(9, 4), score(1005, 1000), rtol=1e-10, atol=1e-10)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_angles_are_exact_at_far_positions() -> None:
    cos_TC, _ = rotary_angles(torch.tensor([1_000_003]), CHANNELS, THETA)
    assert cos_TC.dtype in (torch.float32, torch.float64)
    expected = torch.tensor([1_000_003.0], dtype=torch.float64).cos()
    torch.testing.assert_close(cos_TC[:, 0].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("queries", "length"), [(1, 1), (6, 6), (2, 6), (1, 6)])
def test_visible_positions_equal_the_rule(queries: int, length: int) -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3]])[:, :length]
    valid = torch.tensor([[1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0]]).bool()[:, :length]
    mask = visible_positions(documents, valid, queries, length, documents.device)
    assert mask.shape == (2, 1, queries, length)
    for b in range(2):
        for row in range(queries):
            t = length - queries + row
            for s in range(length):
                same = bool(documents[b, s] == documents[b, t])
                rule = s == t or (s < t and same and bool(valid[b, s]))
                assert mask[b, 0, row, s] == rule


def test_decoding_state_appends_documents_and_validity() -> None:
    state = DecodingState(3)
    assert state.length == 0 and state.layers == [{}, {}, {}]
    state.extend(torch.tensor([[0, 0]]), torch.tensor([[False, True]]))
    documents, valid = state.extend(torch.tensor([[1]]), torch.tensor([[True]]))
    assert documents.tolist() == [[0, 0, 1]] and valid.tolist() == [[False, True, True]]
    assert state.length == 3


def test_dropout_acts_while_training_only() -> None:
    layer, x_BTD = attention(0.5), vectors(2, 20)
    assert torch.equal(layer(x_BTD, context(20))[0], layer(x_BTD, context(20))[0])
    layer.train()
    assert not torch.equal(layer(x_BTD, context(20))[0], layer(x_BTD, context(20))[0])
