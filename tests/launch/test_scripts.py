"""The start scripts: what they call, when they resume, and real runs of the tiny recipe on the CPU."""

import json
import os
import shutil
import subprocess

import pytest
import yaml

from commands import ROOT, _free_port, environment

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("slurm/*.sbatch")])

DEEPSPEED = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
while [[ $1 != --run ]]; do shift; done
mkdir -p "$2/checkpoints/8"
touch "$2/checkpoints/8/manifest.json"
"""
PYTHON = """#!/usr/bin/env bash
printf 'python %s\\n' "$*" >>"$CALLS"
"""


@pytest.fixture
def start(tmp_path):
    """`start(script, *arguments)` runs a start script of a repository whose deepspeed only notes how it
    was called; the exit code and the calls."""
    root = tmp_path / "repository"
    shutil.copytree(LAUNCH, root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("deepspeed", DEEPSPEED), ("python", PYTHON)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(script, *arguments, **variables):
        calls.write_text("")
        known = {"CALLS": str(calls), **variables}
        result = subprocess.run(
            [root / "launch" / script, *arguments],
            cwd=tmp_path,
            env={**os.environ, **known},
            capture_output=True,
            text=True,
            check=False,
        )
        text = calls.read_text().replace(f"{root}/", "")
        return result.returncode, text.splitlines()

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_stop_at_errors_and_say_how_to_use_them(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert "[key.path=value ...]" in text.split("\nset ")[0]
    assert (script.suffix == ".sh") == os.access(script, os.X_OK)


def test_one_gpu_starts_and_resumes(start):
    code, calls = start("start_1gpu.sh", "training.seed=3", MASTER_PORT="1234")
    assert code == 0
    common = "--num_gpus 1 --master_port 1234 launch/train.py --deepspeed ds_configs/zero2.json"
    assert calls == [f"{common} --recipe sra-128e --run runs/sra-128e training.seed=3"]
    code, calls = start("start_1gpu.sh", "training.steps=9", MASTER_PORT="1234")
    assert calls == [f"{common} --resume --run runs/sra-128e training.steps=9"]


SCRIPT_CALLS = {
    "start_2gpu_ffn_parity.sh": "--recipes sra-128e dense-29m --seeds {seeds} --processes 2 "
    "--deepspeed ds_configs/zero2.json --out {out}",
    "reproduce_sra_128e.sh": "--recipes sra-128e stdmoe-128e dense-29m --seeds {seeds} "
    "--matched active --deepspeed ds_configs/zero2.json --out {out}",
}


@pytest.mark.parametrize(
    ("script", "out"),
    [("start_2gpu_ffn_parity.sh", "runs/ffn-parity"), ("reproduce_sra_128e.sh", "runs/reproduce")],
)
def test_comparisons_are_one_call(start, script, out):
    called = f"python tools/compare.py {SCRIPT_CALLS[script]}"
    code, calls = start(script)
    assert code == 0 and calls == [called.format(seeds=19, out=out)]
    asked = ("--jobs", "3", "--set", "training.steps=20", "model.layers=1")
    variables = {"SEEDS": "0,1", "OUT": "here", "DEEPSPEED": "mine.json"}
    code, calls = start(script, *asked, **variables)
    called = called.replace("ds_configs/zero2.json", "mine.json")
    words = "--set training.steps=20 model.layers=1 --jobs 3"
    assert code == 0 and calls == [f"{called.format(seeds='0,1', out='here')} {words}"]


def test_the_reproduction_takes_a_folder_of_texts(start):
    code, (call,) = start("reproduce_sra_128e.sh", "training.steps=20", DATA="texts")
    assert code == 0 and call.endswith(" --set data.path=texts training.steps=20")


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [(["a.yaml", "b/c.yaml"], {}), ([], {"RECIPES": "a.yaml b/c.yaml"})],
)
def test_parity_takes_other_recipes(start, arguments, variables):
    code, (call,) = start("start_2gpu_ffn_parity.sh", *arguments, "x.y=1", **variables)
    assert code == 0 and " --recipes a.yaml b/c.yaml --seeds 19 " in call
    assert call.endswith(" --set x.y=1")


def run_script(script, *arguments, **variables):
    """A start script with the real programs."""
    known = {**environment(), "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [LAUNCH / script, *arguments],
        env={**known, **{key: str(value) for key, value in variables.items()}},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_one_gpu_trains_the_tiny_recipe(tiny, tmp_path):
    run = tmp_path / "run"
    overrides = ["training.steps=3", "evaluation.every=0", "checkpoint.every=0"]
    result = run_script("start_1gpu.sh", *overrides, RECIPE=tiny / "tiny.yaml", RUN=run)
    assert result.returncode == 0, result.stderr
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


@pytest.mark.slow
def test_parity_compares_the_tiny_recipe_and_its_dense_twin(tiny, tmp_path):
    recipe = yaml.safe_load((tiny / "tiny.yaml").read_text())
    recipe |= {"name": "dense", "losses": {"balance": "none", "dispersion": "none"}}
    recipe["model"]["channel"] = {
        "kind": "dense",
        "feed_forward": {"kind": "gelu", "hidden": 64, "dropout": 0.0},
    }
    (tmp_path / "dense.yaml").write_text(yaml.safe_dump(recipe))
    recipes = [tiny / "tiny.yaml", tmp_path / "dense.yaml"]
    result = run_script("start_2gpu_ffn_parity.sh", *recipes, OUT=tmp_path / "runs")
    assert result.returncode == 0, result.stderr
    comparison = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert [row["recipe"] for row in comparison["rows"]] == ["tiny", "dense"]
    assert "| tiny |" in result.stdout and "| dense |" in result.stdout


def test_the_example_hostfile_is_one(monkeypatch):
    from sra_ds.training import rendezvous

    monkeypatch.setenv("SRA_HOSTFILE", str(LAUNCH / "hostfile.example"))
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert rendezvous.planned_hosts() == ["host-a"] * 8 + ["host-b"] * 8
