"""The commands of the README and of family pages are run, on a tiny run where they take one."""

import re
import shlex
import subprocess
import sys

import pytest

from commands import BIN, ROOT, call, train, write_corpus, write_recipe

README = (ROOT / "README.md").read_text("utf-8")


def commands(text: str) -> list[str]:
    """The lines of its sh blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line for block in blocks for line in block.strip().splitlines()]


COMMANDS = commands(README)
RESONANCE = commands((ROOT / "docs" / "resonance.md").read_text("utf-8"))
MOE_FAMILY = commands((ROOT / "docs" / "moe-family.md").read_text("utf-8"))
SRA = commands((ROOT / "docs" / "sra.md").read_text("utf-8"))
TUTORIAL = commands((ROOT / "docs" / "tutorial.md").read_text("utf-8"))
SPECTRAL = commands((ROOT / "docs" / "spectral.md").read_text("utf-8"))
RESONANT = (
    "model.mixer={kind: resonance, heads: 2}",
    "model.channel={kind: prime_masked, feed_forward: {hidden: 32, dropout: 0.0}}",
    *("losses.balance=none", "losses.dispersion=none", "losses.z_weight=0"),
)
BY_HAND = {
    "tools/compare.py": "trains six models; tests/test_cli.py runs it on tiny ones",
    "tools/bench.py": "needs minutes of a quiet machine",
    "tools/selftest.py": "tests/selftest runs it",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a tiny recipe, and a folder for what the commands write."""
    folder = tmp_path_factory.mktemp("readme")
    write_recipe(folder, write_corpus(folder / "text.jsonl"))
    result = train("--recipe", folder / "tiny.yaml", "--run", folder / "run", stage=2)
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def resonant_run(run):
    """The same of a model with resonance mixers and sparse channels."""
    path = run.parent / "resonant"
    recipe = run.parent / "tiny.yaml"
    result = train("--recipe", recipe, "--run", path, *RESONANT, "training.steps=4")
    assert result.returncode == 0, result.stderr
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works(run, command, tmp_path):
    require_success(run, command, tmp_path)


@pytest.mark.parametrize("command", RESONANCE)
def test_a_command_of_the_resonance_page_works(resonant_run, command, tmp_path):
    require_success(resonant_run, command, tmp_path)


@pytest.mark.parametrize("command", [*SRA, *MOE_FAMILY, *SPECTRAL])
def test_a_command_of_the_pages_of_families_works(command, tmp_path):
    require_success(tmp_path / "run", command, tmp_path)


def test_the_tutorial_works_from_its_start_to_its_end(run, tmp_path):
    """In its order, each command with what the ones before have left, on a tiny recipe."""
    recipe, own = run.parent / "tiny.yaml", tmp_path / "run"
    for command in TUTORIAL:
        words = command.replace("$RUN", str(own)).replace("$OUT", str(tmp_path / "card"))
        words = shlex.split(words.replace("--recipe quickstart", f"--recipe {recipe}"))
        words[0] = sys.executable if words[0] == "python" else str(BIN / words[0])
        result = call(*words, cwd=ROOT)
        assert result.returncode == 0, (command, result.stderr)
    assert (own / "report.html").is_file()
    assert {path.name for path in tmp_path.iterdir()} >= {"run", "card.html", "card.json"}


def require_success(run, command, tmp_path):
    """Run a command on a run; training only as far as --dry-run goes."""
    words = shlex.split(command.replace("$RUN", str(run)).replace("$OUT", str(tmp_path / "out")))
    program = next(word for word in words if word.endswith(".py"))
    if program in BY_HAND:
        pytest.skip(BY_HAND[program])
    training = program == "launch/train.py"
    if words[0] == "python":
        words[0] = sys.executable
    else:
        words[0] = str(BIN / words[0])
    extra = ["--dry-run"] if training and "--dry-run" not in words else []
    result = call(*words, *extra, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("target", ["train", "test", "lint"])
def test_make_targets_exist(target):
    result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_readme_is_short_and_names_only_what_exists():
    assert len(README.splitlines()) <= 250
    assert "@" not in README
    for path in re.findall(r"\b(?:tools|launch|ds_configs|tests)/[\w/]+\.\w+", README):
        assert (ROOT / path).exists(), path


def test_every_shipped_recipe_is_in_the_readme():
    for path in (ROOT / "sra_ds" / "recipes").glob("*.yaml"):
        assert f"`{path.stem}`" in README, path.stem
