"""Experts leave a model and come back to the bit; every other change is the one that was asked for."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from commands import losses, train
from sra_ds.config.loading import validate
from sra_ds.files import file_sha256
from sra_ds.inference.export.prune import smaller_recipe
from sra_ds.inference.load import load_run
from sra_ds.storage.checkpoint import read_manifest
from sra_ds.storage.run_dir import RunDir

Call = Callable[..., Any]
MakeRun = Callable[..., RunDir]
Edit = Callable[[Path], object]
STEP, LAYERS, EXPERTS, WIDTH, HIDDEN = 7, 2, 4, 32, 16
UNMEASURED = ("--measure-tokens", 0)
PREFIX = "blocks.1.channel.moe."
LOAD_LE = [[50.0, 0.0, 30.0, 20.0], [0.0, 60.0, 0.0, 40.0]]
"""Layer 0 has one dead expert, layer 1 two."""


def write_load(run: RunDir, load_LE: list[list[float]], step: int = STEP) -> None:
    """A routing snapshot, as training leaves it."""
    load = torch.tensor(load_LE, dtype=torch.float64)
    save_file({"load_LE": load}, run.routing / f"{step}.safetensors")


def state_of(run: RunDir | Path) -> dict[str, Tensor]:
    return load_run(run if isinstance(run, Path) else run.path).model.state_dict()


@torch.no_grad()
def logits_of(run: RunDir | Path) -> Tensor:
    loaded = load_run(run if isinstance(run, Path) else run.path)
    logits = loaded.model(torch.arange(60).view(3, 20)).logits
    assert logits is not None
    return logits


def card_of(folder: Path, layer: int, expert: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (folder / f"layer{layer}-expert{expert:02d}.json").read_text()
    )
    return found


@pytest.fixture
def exported(call: Call, make_run: MakeRun, tmp_path: Path) -> tuple[RunDir, Path]:
    """A run and all its experts as files."""
    run, out = make_run(), tmp_path / "experts"
    assert call("export_experts", "--run", run.path, "--out", out).code == 0
    return run, out


def test_files_hold_the_rows_of_each_expert(
    call: Call, make_run: MakeRun, routed_family: str, tmp_path: Path
) -> None:
    run, out = make_run(routed_family), tmp_path / "experts"
    tree = call("export_experts", "--run", run.path, "--out", out, "--json").tree
    assert tree["experts"] == LAYERS * EXPERTS
    state = state_of(run)
    for layer in range(LAYERS):
        inside = f"blocks.{layer}.channel.moe."
        names = [n for n in state if n.startswith((f"{inside}router", f"{inside}backend"))]
        if "per_expert" not in str(run.recipe().model.channel):
            names = [name for name in names if not name.endswith("temperature")]
        names = [name for name in names if "router.ghost" not in name]
        for expert in range(EXPERTS):
            rows = load_file(out / f"layer{layer}-expert{expert:02d}.safetensors")
            assert len(rows) == len(names)
            for name in names:
                row = rows[name.removeprefix(inside).removeprefix("backend.")]
                assert torch.equal(row, state[name][expert]), name


def test_a_card_says_what_an_expert_is(exported: tuple[RunDir, Path]) -> None:
    run, out = exported
    card, state = card_of(out, 1, 2), state_of(run)
    files = read_manifest(run.checkpoints / str(STEP))["files"]
    assert card["anchor"] == state[f"{PREFIX}router.anchors"][2].tolist()
    assert card["weights_sha256"] == {"model.safetensors": files["model.safetensors"]["sha256"]}
    assert card["sha256"] == file_sha256(out / card["file"])
    assert {key: card[key] for key in ("schema_version", "run", "recipe", "step")} == {
        "schema_version": 1, "run": "run", "recipe": "moe-cosine", "step": STEP,
    }  # fmt: skip
    assert (card["layer"], card["expert"]) == (1, 2)
    assert card["load"] is None and card["top_tokens"] is None
    assert card["tensors"]["experts.up_weight"] == [WIDTH, HIDDEN]
    assert card["model"] == {
        "layers": LAYERS, "experts": EXPERTS, "top_k": 2, "width": WIDTH, "hidden": HIDDEN,
        "kind": "gelu", "bias": True, "router": "cosine", "heads": None,
    }  # fmt: skip
    assert str(run.path.parent) not in (out / "layer1-expert02.json").read_text()


def test_load_and_tokens_come_from_the_analysis_or_else_from_training(
    call: Call, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    asked = ("export_experts", "--run", run.path, "--layer", 0, "--experts", "3,0")
    write_load(run, [[9.0] * EXPERTS] * LAYERS, step=5)
    write_load(run, LOAD_LE)
    result = call(*asked, "--out", tmp_path / "a")
    assert "tools/analyze.py" in result.err
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        f"layer0-expert0{e}.{ending}" for e in (0, 3) for ending in ("json", "safetensors")
    ]
    card = card_of(tmp_path / "a", 0, 3)
    assert card["load"] == {"share": 0.2, "routes": 20, "counted_in": "routing/7.safetensors"}
    experts = [
        {"layer": layer, "expert": expert, "load": load / 100, "top_tokens": [f"t{layer}{expert}"]}
        for layer, loads in enumerate(LOAD_LE)
        for expert, load in enumerate(loads)
    ]
    analysis = {"schema_version": 2, "step": STEP, "experts": experts, "tokens": 500}
    (run.path / "analysis.json").write_text(json.dumps(analysis))
    result = call(*asked, "--out", tmp_path / "b")
    assert "tools/analyze.py" not in result.err
    card = card_of(tmp_path / "b", 0, 3)
    assert card["load"] == {"share": 0.2, "routes": 200, "counted_in": "analysis.json"}
    assert card["top_tokens"] == ["t03"]
    for damaged in (
        {**analysis, "experts": experts[:-1]},
        {"schema_version": 2, "step": STEP, "tokens": 5},
        [],
        {**analysis, "tokens": "x"},
    ):
        (run.path / "analysis.json").write_text(json.dumps(damaged))
        call(*asked, "--out", tmp_path / "c").refused("analysis.json")
    (run.path / "analysis.json").write_text(json.dumps({**analysis, "step": STEP + 1}))
    write_load(run, [[1.0] * 3] * LAYERS)
    call(*asked, "--out", tmp_path / "c").refused("7.safetensors does not tell the load")
    assert not (tmp_path / "c").exists()


def test_merged_back_the_logits_are_the_same_bits(
    call: Call, make_run: MakeRun, routed_family: str, tmp_path: Path
) -> None:
    run, asked = make_run(routed_family), ("export_experts", "--run")
    assert call(*asked, run.path, "--out", tmp_path / "experts").code == 0
    spoilt = make_run(routed_family, {"training": {"seed": 1, "steps": 10}}, "spoilt")
    for source, expected in ((run, True), (spoilt, False)):
        out = tmp_path / f"merged-into-{source.path.name}"
        asked_too = (source.path, "--out", out, "--merge", tmp_path / "experts", "--json")
        tree = call(*asked, *asked_too).tree
        assert tree["experts"] == LAYERS * EXPERTS and tree["from"] == {
            "run step 7": LAYERS * EXPERTS
        }
        assert torch.equal(logits_of(out), logits_of(run)) == expected
        change = tree["perplexity"]
        assert (change["difference"] == change["worse_by_nats_per_token"] == 0) == expected
        assert change["tokens"] > 1000 and change["low"] <= change["high"]
    merged, other, own = state_of(out), state_of(spoilt), state_of(run)
    for name, tensor in merged.items():
        of_experts = ".experts." in name or ".router." in name
        shared = name.endswith("temperature") and tensor.numel() == 1
        shared |= "router.ghost" in name
        assert torch.equal(tensor, (own if of_experts and not shared else other)[name]), name


def test_a_transplant_changes_one_expert_of_one_layer(
    call: Call, exported: tuple[RunDir, Path], tmp_path: Path
) -> None:
    run, experts = exported
    asked = ("export_experts", "--run", run.path, "--as", "1:3", *UNMEASURED)
    for number, name in enumerate(("layer0-expert02.json", "layer0-expert02.safetensors")):
        out = tmp_path / f"out{number}"
        assert call(*asked, "--transplant", experts / name, "--out", out).code == 0
        before, after = state_of(run), state_of(out)
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        parts = (
            "backend.experts.up_weight",
            "backend.experts.up_bias",
            "backend.experts.down_bias",
        )
        parts += ("backend.experts.down_weight", "router.anchors", "router.selection_bias_E")
        assert changed == {PREFIX + part for part in parts}
        for part in parts:
            source = before[f"blocks.0.channel.moe.{part}"][2]
            assert torch.equal(after[PREFIX + part][3], source)
            assert torch.equal(after[PREFIX + part][:3], before[PREFIX + part][:3])
    told = RunDir(out).environment()["derived"]
    assert told["experts"] == {"1:3": "expert 0:2 of run step 7"} and told["run"] == "run"


def pruned_by_hand(run: RunDir, kept: list[list[int]]) -> dict[str, Tensor]:
    state = state_of(run)
    for layer, experts in enumerate(kept):
        for name in state:
            stacked = ".backend.experts." in name or name.endswith(
                ("anchors", "_E", "router.weight")
            )
            stacked = stacked or name.endswith("router.bias")
            stacked = stacked or (name.endswith("temperature") and len(state[name]) == EXPERTS)
            if name.startswith(f"blocks.{layer}.") and stacked:
                state[name] = state[name][experts]
    return state


@pytest.mark.parametrize(
    ("which", "kept"),
    [
        ("dead", [[0, 2, 3], [0, 1, 3]]),
        ("least:1", [[0, 2, 3], [0, 1, 3]]),
        ("least:2", [[0, 2], [1, 3]]),
        ("0:0,1:3,0:1,1:2", [[2, 3], [0, 1]]),
    ],
)
@pytest.mark.parametrize("family", ["moe-cosine", "moe-linear", "moe-swiglu-shared"])
def test_a_pruned_model_is_the_one_without_those_rows(
    call: Call, make_run: MakeRun, tmp_path: Path, family: str, which: str, kept: list[list[int]]
) -> None:
    run, out = make_run(family), tmp_path / "out"
    write_load(run, LOAD_LE)
    tree = call("export_experts", "--run", run.path, "--out", out, "--prune", which, "--json").tree
    assert tree["experts_per_layer"] == {"before": EXPERTS, "after": len(kept[0])}
    assert tree.get("dead_but_kept") == ({"layer 1": "0"} if which == "dead" else None)
    expected, found = pruned_by_hand(run, kept), state_of(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model = load_run(out).model
    assert tree["parameters"]["after"] == sum(p.numel() for p in model.parameters())
    change = tree["perplexity"]
    assert change["difference"] == change["after"] - change["before"] != 0
    nats = math.log(change["after"] / change["before"])
    assert nats == pytest.approx(change["worse_by_nats_per_token"], rel=1e-6)


def test_what_a_dead_expert_did_is_not_missed(
    call: Call, make_run: MakeRun, tmp_path: Path
) -> None:
    """Without the anchors nothing comes close to, every token goes where it went: same logits."""
    run = make_run()
    folder = run.checkpoints / str(STEP)
    model = load_run(run.path).model
    with torch.no_grad():
        for router in model.routers():
            router.selection_bias_E[1] = -1e4
    rewrite_weights(folder, model.state_dict())
    call("export_experts", "--run", run.path, "--out", tmp_path / "out", "--prune", "0:1,1:1")
    recipe = RunDir(tmp_path / "out").recipe()
    assert recipe.model.channel.experts == 3 and recipe.name == "moe-cosine-pruned"
    difference = (logits_of(run) - logits_of(tmp_path / "out")).abs().max()
    assert difference < 1e-5


def rewrite_weights(folder: Path, state: dict[str, Tensor]) -> None:
    """Other weights in a checkpoint, which its manifest agrees with."""
    path, manifest = folder / "model.safetensors", read_manifest(folder)
    save_file(state, path)
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_schedule_of_experts_per_token_stays_within_the_smaller_model(
    call: Call, make_run: MakeRun, tmp_path: Path
) -> None:
    training = {"top_k_schedule": [[0.0, 4], [0.5, 2]], "steps": 10, "batch_size": 4}
    run = make_run("moe-cosine", {"training": training})
    smaller = smaller_recipe(run.recipe(), 3)
    assert smaller.training.top_k_schedule == ((0.0, 3.0), (0.5, 2.0))
    assert validate(smaller.model_dump(mode="json")) == smaller
    asked = ("--out", tmp_path / "out", "--prune", "0:0,1:0", *UNMEASURED)
    assert call("export_experts", "--run", run.path, *asked).code == 0
    assert load_run(tmp_path / "out").model.routers()[0].top_k == 2


def test_warnings_before_and_after_pruning(call: Call, make_run: MakeRun, tmp_path: Path) -> None:
    balance = {"kind": "elastic", "weight": 0.1, "ceiling": 0.3}
    run = make_run("moe-cosine", {"losses": {"balance": balance}})
    write_load(run, LOAD_LE)
    asked = ("--out", tmp_path / "out", "--prune", "least:1", *UNMEASURED)
    err = call("export_experts", "--run", run.path, *asked).err
    assert "load over 50 tokens" in err and "may look dead" in err
    assert "losses.balance.ceiling=0.3 lies below the even share of 3 experts, 0.3333" in err


@pytest.mark.parametrize("which", ["dead", "least:1"])
def test_use_is_known_from_the_checkpoint_when_nothing_else_tells_it(
    call: Call, make_run: MakeRun, tmp_path: Path, which: str
) -> None:
    run = make_run()
    asked = ("export_experts", "--run", run.path, "--out", tmp_path / "out", "--prune", which)
    call(*asked).refused("nothing in", "tells how much its experts are used", "tools/analyze.py")
    folder = run.checkpoints / str(STEP)
    trainer, manifest = json.loads((folder / "trainer.json").read_text()), read_manifest(folder)
    half = [[load / 2 for load in loads] for loads in LOAD_LE]
    trainer["recent_load"] = [[100, half], [100, half]]
    (folder / "trainer.json").write_text(json.dumps(trainer))
    path = folder / "trainer.json"
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    tree = call(*asked, *UNMEASURED, "--json").tree
    assert tree["gone"] == {"layer 0": "1", "layer 1": "2"}


def test_a_pruned_model_trains_on(call: Call, make_run: MakeRun, tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "out"
    asked = ("--out", out, "--prune", "0:0,1:0", *UNMEASURED)
    assert call("export_experts", "--run", run.path, *asked).code == 0
    again = tmp_path / "again"
    options = ("training.steps=3", "logging.every=1", "logging.prompts=[]", "checkpoint.best=false")
    options += ("training.optimizer.learning_rate=1e-5",)
    result = train("--recipe", out / "recipe.yaml", "--init-from", out, "--run", again, *options)
    assert result.returncode == 0, result.stderr[-2000:]
    assert RunDir(again).recipe().model.channel.experts == 3
    assert len(losses(again)) == 3
    before, after = state_of(out), state_of(again)
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert max(moved.values()) < 1e-4  # from these weights, not from new ones
    assert all(value > 0 for name, value in moved.items() if not name.endswith("selection_bias_E"))


def test_without_its_corpus_a_change_is_not_measured(
    call: Call, exported: tuple[RunDir, Path], tmp_path: Path
) -> None:
    run, experts = exported
    environment = run.environment()
    for number, facts in enumerate(({}, {**environment, "corpus_folder": "/nowhere"})):
        run.environment_file.write_text(json.dumps(facts))
        asked = ("--out", tmp_path / f"out{number}", "--merge", experts)
        result = call("export_experts", "--run", run.path, *asked)
        assert result.code == 0 and "corpus is not on this machine" in result.err
        assert "perplexity" not in result.out


BAD_ARGUMENTS = {
    "no expert": (["--experts", "4"], "there is no expert 4 (0 to 3)"),
    "no layer": (["--layer", "2"], "there is no layer 2 (0 to 1)"),
    "no number": (["--experts", "0,x"], "--experts 0,x: 'x' is not the number"),
    "empty": (["--experts", ""], "is not the number"),
    "negative": (["--experts", "-1"], "'-1' is not the number"),
    "layer of a merge": (["--merge", "{out}", "--layer", "0"], "--layer has an effect only without"),
    "experts of a prune": (["--prune", "dead", "--experts", "1"], "--experts has an effect only"),
    "measure an export": (["--measure-tokens", "5"], "--measure-tokens has an effect only with"),
    "as of a merge": (["--merge", "{out}", "--as", "0:1"], "--as has an effect only with --transplant"),
    "as missing": (["--transplant", "{out}/layer0-expert00.json"], "--transplant needs --as"),
    "as without layer": (["--transplant", "{out}", "--as", "3"], "--as 3: expected LAYER:EXPERT"),
    "as beyond": (["--transplant", "{out}/layer0-expert00.json", "--as", "0:9"], "no expert 9"),
    "a folder of many": (["--transplant", "{out}", "--as", "0:1"], "holds 8 experts; name the card"),
    "merge nothing": (["--merge", "{run}"], "holds no exported experts"),
    "merge nowhere": (["--merge", "nowhere"], "neither an exported expert's card nor a folder"),
    "prune nothing": (["--prune", ""], "expected dead, least:N or LAYER:EXPERT"),
    "prune words": (["--prune", "most"], "expected dead, least:N or LAYER:EXPERT"),
    "prune unevenly": (["--prune", "0:1,0:2,1:3"], "would lose 2, 1; name as many in each"),
    "prune one layer": (["--prune", "0:1"], "would lose 1, 0; name as many in each"),
    "prune too many": (["--prune", "least:3"], "leaves 1 experts a layer, fewer than the 2"),
    "prune all": (["--prune", "least:4"], "there are 4 experts in a layer; name 1 to 3"),
    "prune none": (["--prune", "least:0"], "name 1 to 3"),
    "prune no number": (["--prune", "least:x"], "'x' is not the number"),
    "prune beyond": (["--prune", "0:1,1:7"], "there is no expert 7"),
    "prune the living": (["--prune", "dead"], "layer 0 has no dead expert"),
    "two modes": (["--prune", "dead", "--merge", "{out}"], "not allowed with argument"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_one_line_and_write_nothing(
    call: Call, exported: tuple[RunDir, Path], tmp_path: Path, arguments: list[str], says: str
) -> None:
    run, experts = exported
    write_load(run, [[400_000.0 + e for e in range(EXPERTS)]] * LAYERS)
    words = [
        word.replace("{out}", str(experts)).replace("{run}", str(run.path)) for word in arguments
    ]
    result = call("export_experts", "--run", run.path, "--out", tmp_path / "new", *words)
    last = result.err.splitlines()[-1]
    assert result.code == 2 and "error: " in last and says in last
    assert "Traceback" not in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts", "run"]


ABSENT = object()


def edit_card(**changes: Any) -> Edit:
    def act(folder: Path) -> None:
        path = folder / "layer0-expert00.json"
        card = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in card.items() if v is not ABSENT}))

    return act


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    """Other tensors, with a card that has their hash."""

    def act(folder: Path) -> None:
        path = folder / "layer0-expert00.safetensors"
        rows = load_file(path)
        change(rows)
        save_file(rows, path)
        edit_card(sha256=file_sha256(path))(folder)

    return act


def noise(name: str) -> Edit:
    return lambda folder: (folder / name).write_bytes(b"\xff\xfe{")


def not_safetensors(folder: Path) -> None:
    path = folder / "layer0-expert00.safetensors"
    path.write_bytes(b"noise")
    edit_card(sha256=file_sha256(path))(folder)


DAMAGES: dict[str, tuple[Edit, str]] = {
    "no tensors": (lambda f: (f / "layer0-expert00.safetensors").unlink(), "is missing"),
    "other tensors": (noise("layer0-expert00.safetensors"), "is damaged (its hash is not"),
    "card of noise": (noise("layer0-expert00.json"), "is not an expert's card"),
    "card cut": (lambda f: (f / "layer0-expert00.json").write_text('{"a": '), "not an expert's card"),
    "card a list": (lambda f: (f / "layer0-expert00.json").write_text("[]"), "not an expert's card"),
    "nested card": (lambda f: (f / "layer0-expert00.json").write_text("[" * 99_999), "not an expert's"),
    "other schema": (edit_card(schema_version=2), "schema_version Input should be 1"),
    "no hash": (edit_card(sha256=ABSENT), "sha256 Field required"),
    "a key too many": (edit_card(**{"x\ny": 1}), "x y Extra inputs"),
    "layer a text": (edit_card(layer="a"), "layer Input should be a valid integer"),
    "negative expert": (edit_card(expert=-1), "expert Input should be greater"),
    "beyond": (edit_card(expert=8), "there is no expert 8 (0 to 3)"),
    "file elsewhere": (edit_card(file="../layer0-expert00.safetensors"), "file String should match"),
    "twice": (edit_card(expert=1), "are both of expert 0:1"),
    "no safetensors": (not_safetensors, "is not readable"),
    "not a number": (edit_tensors(lambda r: r["experts.up_bias"].fill_(math.nan)), "no finite numbers"),
    "a tensor less": (edit_tensors(lambda r: r.pop("experts.up_bias")), "does not hold the tensors"),
    "whole numbers": (
        edit_tensors(lambda r: r.update({"experts.up_bias": torch.zeros(16, dtype=torch.int32)})),
        "no finite numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_exports_are_refused(
    call: Call, exported: tuple[RunDir, Path], tmp_path: Path, damage: Edit, says: str
) -> None:
    run, experts = exported
    damage(experts)
    asked = ("--out", tmp_path / "out", "--merge", experts)
    call("export_experts", "--run", run.path, *asked).refused(says, str(experts))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts", "run"]


OTHER_SHAPES = {
    "width": ("moe-cosine", {"model": {"width": 64}}, "width=32"),
    "hidden": ("moe-cosine", {"model": {"channel": {"expert": {"hidden": 32}}}}, "hidden=16"),
    "bias": ("moe-cosine", {"model": {"channel": {"expert": {"bias": False}}}}, "bias=True"),
    "kind": ("moe-swiglu-shared", {}, "kind=gelu"),
    "router": ("moe-linear", {}, "router=cosine"),
    "temperature": (
        "moe-cosine",
        {"model": {"channel": {"router": {"temperature": "per_expert"}}}},
        "router.temperature has the shape of nothing there and () here",
    ),
}


@pytest.mark.parametrize(
    ("family", "overlay", "says"), OTHER_SHAPES.values(), ids=OTHER_SHAPES.keys()
)
def test_experts_of_another_shape_are_refused(
    call: Call,
    exported: tuple[RunDir, Path],
    make_run: MakeRun,
    tmp_path: Path,
    family: str,
    overlay: dict[str, Any],
    says: str,
) -> None:
    other = make_run(family, overlay, "other")
    asked = ("--out", tmp_path / "out", "--merge", exported[1])
    call("export_experts", "--run", other.path, *asked).refused(says, str(exported[1]))
    assert not (tmp_path / "out").exists()


def test_more_experts_are_no_other_shape(
    call: Call, exported: tuple[RunDir, Path], make_run: MakeRun, tmp_path: Path
) -> None:
    other = make_run("moe-cosine", {"model": {"channel": {"experts": 6}, "layers": 3}}, "other")
    asked = (
        "--out",
        tmp_path / "out",
        "--merge",
        exported[1] / "layer1-expert03.json",
        *UNMEASURED,
    )
    assert call("export_experts", "--run", other.path, *asked).code == 0
    name = f"{PREFIX}backend.experts.up_weight"
    assert torch.equal(state_of(tmp_path / "out")[name][3], state_of(exported[0])[name][3])


def test_models_without_experts_of_their_own_say_so(
    call: Call, make_run: MakeRun, tmp_path: Path
) -> None:
    dense, hashed = make_run("dense", name="dense"), make_run("moe-hash", name="hash")
    out = ("--out", tmp_path / "out")
    for mode in ((), ("--prune", "dead"), ("--prune", "0:1,1:1")):
        call("export_experts", "--run", dense.path, *out, *mode).refused("is a dense model")
    result = call("export_experts", "--run", hashed.path, *out, "--prune", "0:1,1:1")
    result.refused("hash router", "every token would change its experts")


def test_weights_that_are_not_finite_are_not_exported(
    call: Call, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    state = state_of(run)
    state[f"{PREFIX}router.anchors"][2, 0] = math.inf
    rewrite_weights(run.checkpoints / str(STEP), state)
    result = call("export_experts", "--run", run.path, "--out", tmp_path / "out")
    assert result.code == 2 and "router.anchors of expert 1:2 is not finite" in result.err
    assert not (tmp_path / "out").exists()


def test_a_taken_output_is_left_as_it_was(
    call: Call, exported: tuple[RunDir, Path], tmp_path: Path
) -> None:
    run, experts = exported
    before = shutil.copytree(experts, tmp_path / "copy")
    for mode in ((), ("--merge", experts), ("--prune", "0:1,1:1")):
        call("export_experts", "--run", run.path, "--out", experts, *mode).refused("exists already")
    assert all((before / p.name).read_bytes() == p.read_bytes() for p in experts.iterdir())
