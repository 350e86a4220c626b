"""Checkpoints of the published SRA code give the same logits here as there."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from commands import ROOT, call
from sra_ds.inference.load import load_run

CONVERT = ROOT / "tools" / "convert_checkpoint.py"
WIDTH, LAYERS, HEADS, EXPERTS, HIDDEN, VOCABULARY, LENGTH = 32, 2, 2, 4, 16, 300, 12
OVERRIDES = [
    "data.tokenizer.vocab_size=300", "model.width=32", "model.layers=2", "model.mixer.heads=2",
    "model.channel.experts=4", "model.channel.top_k=2", "model.channel.expert.hidden=16",
    "training.top_k_schedule=[]", "model.document_boundaries=false",
]  # fmt: skip


def published_state(router: str) -> dict[str, Tensor]:
    """A state dict with the published names and random values."""
    torch.manual_seed(5)
    shapes = {
        "token_embed.weight": (VOCABULARY, WIDTH),
        "ln_f.weight": (WIDTH,),
        "ln_f.bias": (WIDTH,),
    }
    for i in range(LAYERS):
        for name in ("ln1", "ln2"):
            shapes |= {f"blocks.{i}.{name}.{part}": (WIDTH,) for part in ("weight", "bias")}
        for letter in "qkvo":
            shapes[f"blocks.{i}.attn.W{letter}.weight"] = (WIDTH, WIDTH)
            shapes[f"blocks.{i}.attn.W{letter}.bias"] = (WIDTH,)
        ff = f"blocks.{i}.ff_or_moe"
        experts = [f"{ff}.experts.{e}" for e in range(EXPERTS)] if router != "dense" else [ff]
        for expert in experts:
            shapes |= {
                f"{expert}.linear1.weight": (HIDDEN, WIDTH),
                f"{expert}.linear1.bias": (HIDDEN,),
            }
            shapes |= {
                f"{expert}.linear2.weight": (WIDTH, HIDDEN),
                f"{expert}.linear2.bias": (WIDTH,),
            }
        if router == "cosine":
            shapes |= {f"{ff}.semantic_anchors": (EXPERTS, WIDTH), f"{ff}.temperature": ()}
        elif router == "linear":
            shapes[f"{ff}.gate.weight"] = (EXPERTS, WIDTH)
    state = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    for name in state:
        if name.endswith("temperature"):
            state[name] = torch.tensor(7.0)
    return {**state, "lm_head.weight": state["token_embed.weight"]}


def published_logits(state: dict[str, Tensor], ids_T: Tensor) -> Tensor:
    """The published forward pass, written down plainly for one sequence."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def network(x: Tensor, name: str) -> Tensor:
        hidden = F.gelu(linear(x, f"{name}.linear1"), approximate="tanh")
        return linear(hidden, f"{name}.linear2")

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), HEADS, -1).transpose(0, 1)

    channels = WIDTH // HEADS
    angles = torch.arange(len(ids_T)).float()[:, None] * 10_000.0 ** (
        -torch.arange(0, channels, 2).float() / channels
    )
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def rotary(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    x = state["token_embed.weight"][ids_T]
    for i in range(LAYERS):
        h, block = norm(x, f"blocks.{i}.ln1"), f"blocks.{i}.attn"
        q, k, v = (heads(linear(h, f"{block}.W{letter}")) for letter in "qkv")
        scores = rotary(q) @ rotary(k).transpose(1, 2) / math.sqrt(channels)
        mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        x = x + linear(mixed.transpose(0, 1).reshape(len(x), WIDTH), f"{block}.Wo")
        h, ff = norm(x, f"blocks.{i}.ln2"), f"blocks.{i}.ff_or_moe"
        if f"{ff}.linear1.weight" in state:
            x = x + network(h, ff)
            continue
        if f"{ff}.gate.weight" in state:
            routed = h @ state[f"{ff}.gate.weight"].T
        else:
            anchors = F.normalize(state[f"{ff}.semantic_anchors"], dim=-1)
            routed = F.normalize(h, dim=-1) @ anchors.T * state[f"{ff}.temperature"].abs()
        weights, ids = routed.softmax(-1).topk(2, dim=-1)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        x = x + torch.stack(
            [
                sum(
                    w * network(token, f"{ff}.experts.{int(e)}")
                    for w, e in zip(ws, es, strict=True)
                )
                for token, ws, es in zip(h, weights, ids, strict=True)
            ]
        )
    return norm(x, "ln_f") @ state["lm_head.weight"].T


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sra_ds.data.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = [" ".join(f"word{n * m}" for n in range(40)) for m in range(40)]
    train_tokenizer(texts, VOCABULARY).save(str(path))
    return path


def convert(file: Path, tokenizer: Path, out: Path, *overrides: str):
    return call(
        sys.executable, CONVERT, "--import-sra", file, "--tokenizer", tokenizer, "--out", out,
        "--recipe", "sra-256e", "--json", *OVERRIDES, *overrides,
    )  # fmt: skip


@pytest.mark.parametrize("router", ["cosine", "linear"])
def test_the_imported_model_computes_what_the_published_one_does(
    router: str, tokenizer: Path, tmp_path: Path
) -> None:
    import random

    import numpy as np

    state = published_state(router)
    file = tmp_path / "best_model.pt"
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    rng = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    torch.save(
        {"model_state_dict": wrapped, "global_step": 41, "rng_state": rng, "config": {}}, file
    )
    linear = ["model.channel.router={kind: linear, gate: all}"] if router == "linear" else []
    linear += ["losses.dispersion=none"] if router == "linear" else []
    result = convert(file, tokenizer, tmp_path / "run", *linear)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["step"] == 41
    model = load_run(tmp_path / "run").model
    ids_T = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits_TV = model(ids_T[None]).logits[0]
    expected_TV = published_logits(state, ids_T)
    torch.testing.assert_close(logits_TV, expected_TV, rtol=1e-4, atol=1e-4)


class Harmful:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("unpickled!",))


def test_what_is_not_a_plain_checkpoint_of_this_model_is_refused(
    tokenizer: Path, tmp_path: Path
) -> None:
    names = ("harmful", "other", "foreign", "counted", "text", "folder")
    harmful, other, foreign, counted, text, folder = (tmp_path / f"{name}.pt" for name in names)
    torch.save({"model_state_dict": published_state("cosine"), "global_step": "41"}, counted)
    text.write_text("hello")
    folder.mkdir()
    torch.save({"model_state_dict": Harmful()}, harmful)
    torch.save({"weights": {}}, other)
    state = published_state("cosine")
    torch.save({"model_state_dict": {k: v for k, v in state.items() if "ln_f" not in k}}, foreign)
    for file, says in (
        (harmful, "plain values"),
        (other, "no model_state_dict"),
        (foreign, "ln_f"),
        (counted, "global_step is '41'"),
        (text, "plain values"),
        (folder, "plain values"),
    ):
        result = convert(file, tokenizer, tmp_path / "run")
        assert result.returncode == 2 and says in result.stderr, result.stderr
        assert "unpickled!" not in result.stdout + result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not list(tmp_path.glob("run*"))
