"""A trace is what the model does, token by token: every router, window, document and domain."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from references import hash_ids_loop
from saved_runs import random_model
from sra_ds.analysis import counts
from sra_ds.analysis.traces import UNTRAINED_SEED, Pass, Trace, record
from sra_ds.config import Recipe
from sra_ds.data.loader import document_ids
from sra_ds.data.shards import ShardWriter, TokenSplit
from sra_ds.errors import DataError
from sra_ds.model.init import initialise_router
from sra_ds.model.language_model import LanguageModel
from sra_ds.moe.routers import build_router

VOCABULARY, LENGTH = 300, 16
DOCUMENTS = [9, 1, 40, 0, 17, 63, 3, 22]
DOMAINS = ["first", "second", "third"]
MODELS: dict[str, dict[str, Any]] = {
    "cosine": {"router": {"kind": "cosine"}},
    "linear": {"router": {"kind": "linear"}},
    "random": {"router": {"kind": "random"}},
    "hash": {"router": {"kind": "hash"}},
    "per-expert temperature": {"router": {"temperature": "per_expert", "gate": "straight_through"}},
    "k=1": {"top_k": 1},
    "k=E": {"top_k": 4},
    "one expert": {"experts": 1, "top_k": 1},
    "300 experts": {"experts": 300, "top_k": 3},
}


class Seen(NamedTuple):
    """What one layer did with N tokens, found window by window."""

    x_ND: np.ndarray
    ids_NK: np.ndarray
    gates_NK: np.ndarray
    scores_NE: np.ndarray


@pytest.fixture
def split(tmp_path: Path) -> TokenSplit:
    """163 tokens in eight documents of very different lengths, of three domains in turn."""
    rng, writer = np.random.default_rng(0), ShardWriter(tmp_path, "valid", "uint16", 0)
    for number, size in enumerate(DOCUMENTS):
        writer.add(
            rng.integers(1, VOCABULARY, size).tolist(), words=size, size=size, domain=number % 3
        )
    return TokenSplit(tmp_path, writer.close(), "uint16", DOMAINS)


@pytest.fixture
def make_model(tiny_recipe: Callable[..., Recipe]) -> Callable[..., LanguageModel]:
    """A random model with this channel."""

    def make(channel: dict[str, Any] | None = None, family: str = "moe-cosine") -> LanguageModel:
        overlay: dict[str, Any] = {"data": {"tokenizer": {"vocab_size": VOCABULARY}}}
        if channel:
            overlay["model"] = {"channel": channel}
        return random_model(tiny_recipe(family, overlay)).eval()

    return make


def how(batch_size: int = 3, tokens: int = 0) -> Pass:
    return Pass(LENGTH, batch_size, 0, tokens)


@torch.no_grad()
def by_hand(model: LanguageModel, split: TokenSplit, tokens: int) -> list[Seen]:
    """Windows one by one without padding; the last one has as much context as the others."""
    given: list[torch.Tensor] = []
    handles = [
        router.register_forward_hook(lambda _, arguments, __: given.append(arguments[0]))
        for router in model.routers()
    ]
    parts: list[list[tuple[Any, ...]]] = [[] for _ in handles]
    for begin in range(0, tokens, LENGTH):
        end = min(begin + LENGTH, tokens)
        first = max(0, end - LENGTH)
        ids_1T = torch.from_numpy(split.read(first, end))[None]
        given.clear()
        output = model(ids_1T, None, document_ids(ids_1T, 0), keep_scores=True)
        for part, x_TD, routing in zip(parts, given, output.routings, strict=True):
            found = (x_TD, routing.expert_ids_TK, routing.gates_TK, routing.scores_TE)
            part.append(tuple(tensor[begin - first :] for tensor in found))
    for handle in handles:
        handle.remove()
    return [
        Seen(*(torch.cat(f).double().numpy() for f in zip(*part, strict=True))) for part in parts
    ]


def domain_of_tokens(tokens: int) -> np.ndarray:
    """Each document has its mark and its tokens."""
    numbers = [n % 3 for n, size in enumerate(DOCUMENTS) for _ in range(size + 1)]
    return np.array(numbers[:tokens])


@pytest.mark.parametrize("channel", MODELS.values(), ids=list(MODELS))
def test_every_router_is_traced_as_it_decides(
    channel: dict[str, Any], make_model: Any, split: TokenSplit, tmp_path: Path
) -> None:
    """Each token once, in order, with the choices, gates and scores of the model on its window."""
    model = make_model(channel)
    trace = record(model, split, how(), tmp_path / "trace", {})
    assert trace.tokens == split.tokens - 1 == 162  # the last token opens no target
    np.testing.assert_array_equal(trace.tokens_N, split.read(0, 162))
    experts = model.config.channel.experts
    assert trace.experts_NLK.dtype == ("uint16" if experts > 256 else "uint8")
    for layer, seen in enumerate(by_hand(model, split, 162)):
        ids_NK = seen.ids_NK.astype(int)
        np.testing.assert_array_equal(trace.experts_NLK[:, layer], ids_NK)
        gates_NK = trace.gates_NLK[:, layer] / 65_535
        np.testing.assert_allclose(gates_NK, seen.gates_NK, atol=2e-5)
        check_counts(trace, layer, ids_NK, experts)
        check_means(trace, layer, seen._replace(ids_NK=ids_NK), experts)


def check_counts(trace: Trace, layer: int, ids_NK: np.ndarray, experts: int) -> None:
    """Sums over the decisions, one by one."""
    tokens_VE, pairs_EE = np.zeros((VOCABULARY, experts)), np.zeros((experts, experts))
    domains_GE = np.zeros((len(DOMAINS), experts))
    domain_N = domain_of_tokens(trace.tokens)
    for token, domain, chosen in zip(trace.tokens_N, domain_N, ids_NK, strict=True):
        for expert in chosen:
            tokens_VE[token, expert] += 1
            domains_GE[domain, expert] += 1
            for other in chosen:
                pairs_EE[expert, other] += 1
    found = trace.counts(layer)
    rows_P, experts_P = np.nonzero(tokens_VE)
    np.testing.assert_array_equal(found.rows_P, rows_P)
    np.testing.assert_array_equal(found.experts_P, experts_P)
    np.testing.assert_array_equal(found.counts_P, tokens_VE[rows_P, experts_P])
    np.testing.assert_array_equal(trace.load_LE[layer], tokens_VE.sum(0))
    np.testing.assert_array_equal(trace.pairs_LEE[layer], pairs_EE)
    np.testing.assert_array_equal(trace.domain_loads_LGE[layer], domains_GE)


def check_means(trace: Trace, layer: int, seen: Seen, experts: int) -> None:
    """Vectors, gates and scores an expert was given; the lead where it is first; NaN for an idle one."""
    best_N2 = np.sort(seen.scores_NE, 1)[:, ::-1][:, :2]
    lead_N = best_N2[:, 0] - best_N2[:, -1]
    for expert in range(experts):
        here_NK = seen.ids_NK == expert
        here_N, first_N = here_NK.any(1), here_NK[:, 0]
        centroid_D = seen.x_ND[here_N].mean(0) if here_N.any() else np.zeros(seen.x_ND.shape[1])
        np.testing.assert_allclose(trace.centroids_LED[layer, expert], centroid_D, atol=1e-5)
        expected = {
            "gate": seen.gates_NK[here_NK].mean() if here_N.any() else np.nan,
            "score": seen.scores_NE[here_N, expert].mean() if here_N.any() else np.nan,
            "margin": lead_N[first_N].mean() if first_N.any() else np.nan,
        }
        for name, value in expected.items():
            found = trace.expert_means[name][layer, expert]
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 130, 161])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_part_of_the_text_is_traced_like_the_whole(
    tokens: int, batch_size: int, make_model: Any, split: TokenSplit, tmp_path: Path
) -> None:
    """Windows that are not full are padded; padding is in no count, and documents end where they end."""
    model = make_model()
    trace = record(model, split, how(batch_size, tokens), tmp_path / "trace", {})
    assert trace.tokens == tokens and trace.load_LE.sum() == tokens * 2 * 2
    for layer, seen in enumerate(by_hand(model, split, tokens)):
        np.testing.assert_array_equal(trace.experts_NLK[:, layer], seen.ids_NK)
    starts = np.cumsum([0, *(size + 1 for size in DOCUMENTS)])
    begun = [start for start in starts[:-1] if start < tokens]
    assert trace.documents["start"].tolist() == begun
    assert trace.documents["domain"].tolist() == [n % 3 for n in range(len(begun))]
    assert all(trace.tokens_N[start] == 0 for start in begun) and trace.domains == DOMAINS


def test_asking_for_more_than_there_is_traces_all(
    make_model: Any, split: TokenSplit, tmp_path: Path
) -> None:
    assert record(make_model(), split, how(tokens=10**6), tmp_path / "trace", {}).tokens == 162


def test_counts_are_the_same_however_they_are_gathered(
    make_model: Any, split: TokenSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged after every batch, and in batches of one window and of all."""
    model = make_model()
    whole = record(model, split, how(20), tmp_path / "whole", {})
    monkeypatch.setattr(counts, "PENDING_PAIRS", 1)
    merged = record(model, split, how(1), tmp_path / "merged", {})
    for layer in range(2):
        for a, b in zip(whole.counts(layer), merged.counts(layer), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(whole.centroids_LED, merged.centroids_LED, atol=1e-6)


@pytest.mark.parametrize("channel", list(MODELS.values())[:4], ids=list(MODELS)[:4])
def test_the_untrained_twin_decides_on_the_same_vectors(
    channel: dict[str, Any], make_model: Any, split: TokenSplit, tmp_path: Path
) -> None:
    """A router of the same kind with initial values of its own, the same in every pass."""
    model = make_model(channel)
    first = record(model, split, how(), tmp_path / "first", {})
    again = record(model, split, how(5), tmp_path / "again", {})
    np.testing.assert_array_equal(first.untrained_NLK, again.untrained_NLK)
    for layer, seen in enumerate(by_hand(model, split, 162)):
        twin = build_router(model.config.channel.router, 32, 4, 2)
        initialise_router(twin, UNTRAINED_SEED, f"layer{layer}")
        twin.eval()
        x_TD, ids_T = torch.from_numpy(seen.x_ND).float(), torch.from_numpy(split.read(0, 162))
        own_NK = twin(x_TD, None, ids_T).expert_ids_TK.detach().numpy()
        np.testing.assert_array_equal(first.untrained_NLK[:, layer], own_NK)
    differ = (first.untrained_NLK != first.experts_NLK).mean()
    if channel["router"]["kind"] == "hash":  # it has no values
        assert differ == 0
        assert first.untrained_NLK[:, 1].tolist() == hash_ids_loop(first.tokens_N.tolist(), 4, 2)
    else:
        assert differ > 0.4


def test_tracing_leaves_the_model_as_it_was(
    make_model: Any, split: TokenSplit, tmp_path: Path
) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record(model, split, how(), tmp_path / "trace", {})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(router._forward_hooks for router in model.routers()) and not model.training


def test_a_trace_is_read_again_for_the_same_identity(
    make_model: Any, split: TokenSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the model; for another one it is written anew."""
    model, folder = make_model(), tmp_path / "trace"
    identity = {"weights": ["a"], "text": {"files": {"x": [1, 2]}}, "tokens": 0}
    record(model, split, how(), folder, identity)
    monkeypatch.setattr(model, "encode", None)
    assert record(model, split, how(), folder, identity).tokens == 162
    other = record(make_model({"top_k": 1}), split, how(), folder, {**identity, "tokens": 5})
    assert other.top_k == 1 and other.facts["identity"]["tokens"] == 5


def test_a_pass_that_dies_leaves_nothing_and_the_next_one_works(
    make_model: Any, split: TokenSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside the rest of a killed process, and in place of a folder that is no trace."""
    model, folder = make_model(), tmp_path / "routing" / "trace"
    encode, calls = model.encode, []

    def fail(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*arguments, **named)

    monkeypatch.setattr(model, "encode", fail)
    with pytest.raises(KeyboardInterrupt):
        record(model, split, how(), folder, {})
    assert list(folder.parent.iterdir()) == []
    assert not any(router._forward_hooks for router in model.routers())
    killed = folder.with_name("trace.partial")
    for rest in (killed, folder):
        rest.mkdir()
        (rest / "experts.bin").write_bytes(b"rest")
    (killed / "unfinished").touch()
    assert record(model, split, how(), folder, {}).tokens == 162
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_traces_what_the_cpu_does(make_model: Any, split: TokenSplit, tmp_path: Path) -> None:
    model = make_model()
    here = record(model, split, how(), tmp_path / "cpu", {})
    there = how()._replace(device=torch.device("cuda"))
    found = record(model.to("cuda"), split, there, tmp_path / "cuda", {})
    np.testing.assert_array_equal(found.tokens_N, here.tokens_N)
    assert (found.experts_NLK == here.experts_NLK).mean() > 0.99  # a tie may fall the other way
    assert (found.untrained_NLK == here.untrained_NLK).mean() > 0.99
    assert found.load_LE.sum() == here.load_LE.sum()


def test_what_is_no_trace_is_refused(make_model: Any, split: TokenSplit, tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    with pytest.raises(DataError, match="not a routing trace"):
        Trace(folder)
    record(make_model(), split, how(), folder, {})
    data = (folder / "experts.bin").read_bytes()
    (folder / "experts.bin").write_bytes(data[:-1])
    with pytest.raises(DataError, match=re.escape("experts.bin is damaged (its size is wrong)")):
        Trace(folder)
    (folder / "experts.bin").write_bytes(data)
    facts = json.loads((folder / "trace.json").read_text())
    (folder / "trace.json").write_text(json.dumps({**facts, "schema_version": 0}))
    with pytest.raises(DataError, match="another version"):
        Trace(folder)


def test_a_dense_model_has_nothing_to_trace(
    make_model: Any, split: TokenSplit, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no routed layers"):
        record(make_model(family="dense"), split, how(), tmp_path / "trace", {})
    assert not (tmp_path / "trace").exists()
