"""The exported folder is the same model in transformers: logits, texts, tokens; without this package."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sra_ds.config.model import AttentionConfig, CosineRouterConfig
from sra_ds.data.tokenizer import END_OF_TEXT
from sra_ds.errors import ConfigError
from sra_ds.inference.generate import Sampling, next_tokens
from sra_ds.inference.hf.export import KNOWN, require_known
from sra_ds.inference.load import LoadedRun, load_run
from sra_ds.storage.run_dir import RunDir

Call = Callable[..., Any]
MakeRun = Callable[..., RunDir]
GREEDY = Sampling(temperature=0)
PROMPTS = ["abc de", "", "j", "abcdefghij fgh a b c", "\U0001f642 naïve"]
NEW, VOCABULARY = 12, 320


def channel(**changes: Any) -> dict[str, Any]:
    return {"model": {"channel": changes}}


VARIANTS = {
    "moe-cosine": ("moe-cosine", {}),
    "moe-linear": ("moe-linear", {}),
    "moe-hash": ("moe-hash", {}),
    "dense": ("dense", {}),
    "moe-swiglu-shared": ("moe-swiglu-shared", {}),
    "random": ("moe-cosine", channel(router={"kind": "random", "temperature": 5.0})),
    "fixed": ("moe-cosine", channel(router={"temperature": "fixed", "gate": "selected"})),
    "no temperature, k=1": ("moe-cosine", channel(top_k=1, router={"temperature": "none"})),
    "straight through, k=1": ("moe-linear", channel(top_k=1, router={"gate": "straight_through"})),
    "selected, k=1": ("moe-cosine", channel(top_k=1, router={"gate": "selected"})),
    "no bias": ("moe-linear", channel(expert={"bias": False}, router={"bias": False})),
    "all experts": ("moe-cosine", channel(top_k=4, shared_expert={"kind": "gelu", "hidden": 8})),
    "scaled": ("moe-cosine", channel(top_k=3, routed_scale="k")),
    "dense swiglu": ("dense", channel(feed_forward={"kind": "swiglu", "hidden": 24})),
}


def export(call: Call, run: RunDir) -> Path:
    out = run.path.with_name(f"{run.path.name}-hf")
    assert call("export_hf", "--run", run.path, "--out", out).code == 0
    return out


def opened(folder: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    return model.eval()


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(params=list(VARIANTS))
def pair(request, call: Call, make_run: MakeRun) -> tuple[LoadedRun, Path, Any]:
    """Each model in turn: ours, the folder, and the one transformers opens."""
    run = make_run(*VARIANTS[request.param])
    folder = export(call, run)
    return load_run(run.path), folder, opened(folder)


@torch.no_grad()
def test_it_is_the_same_model(pair: tuple[LoadedRun, Path, Any]) -> None:
    """To rounding in float32; in float64 nearly nothing is left of the difference."""
    ours, _, theirs = pair
    ids_BT = torch.randint(0, 300, (3, 40))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        mine = ours.model.to(dtype)(ids_BT, keep_scores=True)
        other = theirs.to(dtype)(ids_BT, output_router_logits=True)
        assert other.logits.dtype == dtype and mine.logits.abs().max() > 1
        assert (mine.logits - other.logits).abs().max() <= tolerance
        assert len(other.router_logits) == len(mine.routings)
        for routing, scores_NE in zip(mine.routings, other.router_logits, strict=True):
            assert (routing.scores_TE - scores_NE).abs().max() <= 10 * tolerance


def test_batched_greedy_texts_are_ours(pair: tuple[LoadedRun, Path, Any]) -> None:
    """Padded on the left, with cached keys and values; also with a cache of fixed length."""
    ours, folder, theirs = pair
    tokenizer = tokenizer_of(folder)
    steps = next_tokens(ours.model, ours.tokenizer, PROMPTS, NEW, GREEDY)
    mine_BT = torch.tensor([list(row) for row in zip(*steps, strict=True)])
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert batch.attention_mask[:, 0].tolist() != [1] * len(PROMPTS)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        found_BT = theirs.generate(**batch, max_new_tokens=NEW, do_sample=False, **options)
        new_BT = found_BT[:, batch.input_ids.shape[1] :]
        assert torch.equal(new_BT, mine_BT[:, : new_BT.shape[1]]), options


@torch.no_grad()
def test_padded_logits_and_loss_are_ours(pair: tuple[LoadedRun, Path, Any]) -> None:
    ours, folder, theirs = pair
    batch = tokenizer_of(folder)(PROMPTS, return_tensors="pt", padding=True)
    valid_BT = batch.attention_mask.bool()
    mine = ours.model(batch.input_ids, valid_BT=valid_BT).logits
    found = theirs(**batch, labels=batch.input_ids.where(valid_BT, -100))
    assert (found.logits - mine)[valid_BT].abs().max() <= 1e-5
    targets_BT = torch.full_like(batch.input_ids, -100)
    targets_BT[:, :-1] = batch.input_ids.where(valid_BT, -100)[:, 1:]
    scored = ours.model(batch.input_ids, targets_BT, valid_BT=valid_BT)
    torch.testing.assert_close(found.loss, scored.loss_sum / scored.token_count)


@pytest.fixture
def folder(call: Call, make_run: MakeRun) -> Path:
    return export(call, make_run())


TEXTS = [
    *PROMPTS, " two  spaces ,  a comma .", "\n\n\ttabs\r\n", f"a {END_OF_TEXT} b", "\ufffd", "don 't",
    "cafe\u0301 \u0000 \u2028",
]  # fmt: skip


def test_the_tokenizer_is_ours_and_opens_each_text(folder: Path, make_run: MakeRun) -> None:
    ours = load_run(make_run(name="other").path).tokenizer
    theirs = tokenizer_of(folder)
    assert set(theirs("abc")) == {"input_ids", "attention_mask"}
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (END_OF_TEXT,) * 3
    assert len(theirs) == ours.get_vocab_size() and theirs.padding_side == "left"
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert theirs(text).input_ids == [theirs.bos_token_id, *ids], text
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
        assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False) == text
    assert theirs(TEXTS).input_ids == [theirs(text).input_ids for text in TEXTS]


def test_a_tokenizer_with_a_processor_of_its_own_keeps_it(call: Call, make_run: MakeRun) -> None:
    """As GPT-2's has."""
    run = make_run()
    tokenizer = Tokenizer.from_file(str(run.tokenizer_file))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save(str(run.tokenizer_file))
    folder = export(call, run)
    for text in PROMPTS:
        assert tokenizer_of(folder)(text).input_ids == [0, *tokenizer.encode(text).ids]
    assert "ByteLevel" in str(json.loads((folder / "tokenizer.json").read_text())["post_processor"])


def test_the_folder_opens_without_this_package_and_without_a_net(
    folder: Path, tmp_path: Path
) -> None:
    """In a process of its own, far from the sources, where importing sra_ds fails."""
    script = f"""
import socket, sys
sys.modules["sra_ds"] = None
def refuse(*_, **__): raise OSError("no net")
socket.socket.connect = refuse
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)
unasked = AutoTokenizer.from_pretrained({str(folder)!r})  # asks whether it may run code, and need not
assert unasked("abc").input_ids == tokenizer("abc").input_ids
batch = tokenizer(["abc", "d"], return_tensors="pt", padding=True)
print(model.generate(**batch, max_new_tokens=3, do_sample=False).tolist())
model.save_pretrained("again")
"""
    environment = {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    batch = tokenizer_of(folder)(["abc", "d"], return_tensors="pt", padding=True)
    expected = opened(folder).generate(**batch, max_new_tokens=3, do_sample=False).tolist()
    assert result.stdout.strip().endswith(str(expected))
    again = opened(tmp_path / "again").state_dict()
    assert all(torch.equal(again[n], t) for n, t in opened(folder).state_dict().items())


def test_what_is_in_the_folder(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "configuration_sra.py", "modeling_sra.py",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["exported_from"] == {"run": "run", "recipe": "moe-cosine", "step": 7}
    assert not any(str(folder.parent).encode() in path.read_bytes() for path in folder.iterdir())
    assert "sra_ds" not in {
        line.split()[1].split(".")[0]
        for source in ("configuration_sra.py", "modeling_sra.py")
        for line in (folder / source).read_text().splitlines()
        if line.startswith(("import ", "from "))
    }


@torch.no_grad()
def test_rows_without_a_token_are_never_drawn(call: Call, make_run: MakeRun, corpus: Any) -> None:
    data = {**corpus[0].model_dump(mode="json"), "tokenizer": {"vocab_size": 400}}
    run = make_run("moe-cosine", {"data": data})
    ours = load_run(run.path)
    entries = ours.tokenizer.get_vocab_size()
    assert entries < 400
    folder = export(call, run)
    theirs, tokenizer = opened(folder), tokenizer_of(folder)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert theirs(**batch).logits.argmax(-1).max() >= entries
    found_BT = theirs.generate(**batch, max_new_tokens=NEW, do_sample=False)
    mine = zip(*next_tokens(ours.model, ours.tokenizer, PROMPTS, NEW, GREEDY), strict=True)
    assert found_BT[:, batch.input_ids.shape[1] :].tolist() == [list(row) for row in mine]


@torch.no_grad()
def test_in_bf16_the_routers_stay_in_float32(folder: Path) -> None:
    exact, rounded = opened(folder), opened(folder, dtype=torch.bfloat16)
    kept = {name: tensor.dtype for name, tensor in rounded.state_dict().items()}
    assert {dtype for name, dtype in kept.items() if ".router." in name} == {torch.float32}
    assert {dtype for name, dtype in kept.items() if ".router." not in name} == {torch.bfloat16}
    ids_BT = torch.randint(0, 300, (2, 20))
    logits = rounded(ids_BT).logits
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    nearly = (logits - exact(ids_BT).logits).abs().median()
    assert nearly < 0.05


@torch.no_grad()
def test_a_model_that_is_built_and_not_loaded_has_values(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    ids_BT = torch.randint(0, 300, (2, 20))
    assert float(model(ids_BT, labels=ids_BT).loss) == pytest.approx(math.log(VOCABULARY), abs=0.2)
    assert all(
        (tensor == 10).all() for name, tensor in model.state_dict().items() if "temper" in name
    )


def test_fine_tuning_reaches_every_parameter(folder: Path) -> None:
    model = opened(folder).train()
    ids_BT = torch.randint(0, 300, (8, 40))
    model(ids_BT, labels=ids_BT).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class NewMixerConfig(AttentionConfig):
    window: int = 5


def test_what_the_model_file_does_not_know_is_refused(
    call: Call, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    model = run.recipe().model
    unknown = model.model_copy(update={"mixer": NewMixerConfig(heads=2)})
    with pytest.raises(ConfigError, match=r"^model\.mixer: .* attention parts cannot be exported"):
        require_known(unknown, "model")
    monkeypatch.setitem(KNOWN, NewMixerConfig, KNOWN[AttentionConfig])
    with pytest.raises(ConfigError, match=r"^model\.mixer\.window: .* cannot be exported"):
        require_known(unknown, "model")
    monkeypatch.delitem(KNOWN, CosineRouterConfig)
    asked = ("export_hf", "--run", run.path, "--out", tmp_path / "out")
    call(*asked).refused("model.channel.router: a model with cosine parts cannot be exported")
    assert not (tmp_path / "out").exists()


def test_wrong_places_are_one_line(call: Call, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    call("export_hf", "--run", tmp_path, "--out", tmp_path / "out").refused(
        "is not a run directory"
    )
    call("export_hf", "--run", run.path, "--out", run.path).refused("exists already", "--out")
    asked = ("--out", tmp_path / "out", "--checkpoint", "9")
    call("export_hf", "--run", run.path, *asked).refused("steps kept: 7")
    tree = call("export_hf", "--run", run.path, "--out", tmp_path / "out", "--json").tree
    assert tree["parameters"] == sum(p.numel() for p in load_run(run.path).model.parameters())
