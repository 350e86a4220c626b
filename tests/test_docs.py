"""Every sh block of the README and of the pages in docs/ is run, in the order of its page, by the shell,
in a folder where what it names is there; training only as far as --dry-run goes, but in the tutorial.
Comparisons and measurements, which need minutes, are parsed by their tools.
"""

import argparse
import json
import lzma
import random
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from commands import RECIPE, ROOT, environment, train
from sra_ds import cli
from sra_ds.config.loading import merge
from sra_ds.evaluation.compare.budgets import budget, require_matched
from sra_ds.evaluation.compare.cells import cells_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "tools/compare.py": "tests/evaluation/test_compare.py",
    "tools/bench.py": "tests/benchmarks/",
    "tools/selftest.py": "tests/selftest/",
}
"""What needs minutes at any size, and where it is run on tiny ones."""
RESONANT = (
    "model.mixer={kind: resonance, heads: 2}",
    "model.channel={kind: prime_masked, feed_forward: {hidden: 32, dropout: 0.0}}",
    *("losses.balance=none", "losses.dispersion=none", "losses.z_weight=0"),
)
LETTERS = ("A", "B", "G", "H", "VALID", "TEST")
"""Folders of texts, as the pages call them."""
MANY = ("model.layers=4", "model.channel.experts=64", "model.channel.expert.hidden=8")
"""As many as the pages speak of by their numbers."""
RUNS = {"resonance": "resonant", "experts": "many", "export": "many"}
PLACES = ("London", "Paris", "Vienna", "Boston", "Prague", "the village")
DEEDS = ("moved to", "was born in", "came back from", "wrote a book about", "left")


TEXTS = ("my/held-out.jsonl", "FILE.jsonl", *(f"{name}/own.jsonl" for name in LETTERS))
REFUSED = {"--prune dead": "has no dead expert"}
"""What only some runs allow: here the command has to say why not."""


def commands(page: Path) -> list[str]:
    """The lines of its sh blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.S)
    return [line for block in blocks for line in block.strip().splitlines()]


def story(number: int) -> str:
    """Sentences about people, years and places."""
    rng = random.Random(number)
    who = rng.choice(("She", "He"))
    sentences = (
        f"In {rng.randint(1800, 2020)} {who.lower()} {rng.choice(DEEDS)} {rng.choice(PLACES)}, and "
        f"{rng.randint(2, 90)} people of {rng.choice(PLACES)} saw {rng.choice(('her', 'his'))} house."
        for _ in range(rng.randint(7, 12))
    )
    return " ".join(sentences)


def write_stories(path: Path, first: int, count: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    lines = (json.dumps({"text": story(number)}) for number in range(first, first + count))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's root, with texts and runs under the names of the pages."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("README.md", "docs", "ds_configs", "launch", "sra_ds", "tools"):
        (folder / name).symlink_to(ROOT / name)
    corpus = write_stories(folder / "stories.jsonl", 0, 120)
    longer = write_stories(folder / "more-stories.jsonl", 0, 300)  # every expert has to get some
    for number, name in enumerate(TEXTS):
        write_stories(folder / name, 300 + 40 * number, 40)
    for number, name in enumerate(("formal.txt", "casual.txt")):
        (folder / name).write_text("\n".join(story(9000 + 30 * number + n) for n in range(30)))
    data = {"train": [str(corpus)], "directory": str(folder / "data"), "sequence_length": 128}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(merge(RECIPE, {"data": data})))
    for name, parts in (
        ("run", ()),
        ("resonant", RESONANT),
        ("many", (*MANY, f"data.train=[{longer}]")),
    ):
        made = train("--recipe", folder / "tiny.yaml", "--run", folder / name, *parts, stage=2)
        assert made.returncode == 0, made.stderr
    (folder / "RUN").symlink_to(folder / "many")
    for name in ("SRA", "STDMOE", "OTHER_RUN"):
        (folder / name).symlink_to(folder / "run")
    return folder


@pytest.fixture
def shell(desk: Path, tmp_path: Path) -> Callable[..., None]:
    """`shell(line)` as a user would type it; `$OUT` is another one for each command that writes it."""
    variables = {"OTHER": str(desk / "many"), "OUT": ""}
    made = 0

    def act(line: str, **others: str) -> None:
        nonlocal made
        if re.search(r"--(out|html) \$OUT", line):
            made += 1
            variables["OUT"] = str(tmp_path / f"out{made}")
        result = subprocess.run(
            ["bash", "-c", line],
            cwd=desk,
            env={**environment(), **variables, **others},
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        refusal = next((why for what, why in REFUSED.items() if what in line), "")
        assert result.returncode == (2 if refusal else 0), (line, result.stderr)
        assert refusal in result.stderr

    return act


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda p: p.stem)
def test_the_commands_of_a_page_work(
    page: Path, desk: Path, shell: Callable[..., None], tmp_path: Path
) -> None:
    PREPARE.get(page.stem, lambda desk, shell: None)(desk, shell)
    run = {"RUN": str(desk / RUNS.get(page.stem, "run"))}
    for line in commands(page):
        if any(program in line for program in ELSEWHERE):
            continue
        if page.stem == "tutorial":
            shell(line.replace("--recipe quickstart", "--recipe tiny.yaml"), RUN="tutorial")
        else:
            shell(line + " --dry-run" * ("launch/train.py" in line and "--dry" not in line), **run)
    if page.stem == "tutorial":
        left = {path.suffix for path in tmp_path.iterdir()}
        assert {".html", ".json"} <= left and (desk / "tutorial" / "report.html").is_file()


def prepare_export(desk: Path, shell: Callable[..., None]) -> None:
    shell("python tools/export_experts.py --run many --out EXPORT --layer 2 --experts 0,7")


def prepare_coherence(desk: Path, shell: Callable[..., None]) -> None:
    """A judge of transformers and labelled texts, as small as they may be."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(desk / "run" / "tokenizer.json"), bos_token="<|endoftext|>"
    )
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
    torch.manual_seed(0)
    judge = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    for part in (tokenizer, judge):
        part.save_pretrained(desk / "HF_DIR")
    pairs = "ID\tText\tPronoun\tPronoun-offset\tA\tA-coref\tB\tB-coref\n"
    pairs += "1\tAnn met Bea when she sang.\tshe\t17\tAnn\tTRUE\tBea\tFALSE\n"
    sentence = "novel\t0\t0\tcat\t(1)\nnovel\t0\t1\tsat\t_"
    novel = f"#begin document (novel); part 0\n{sentence}\n\n{sentence}\n\n#end document\n"
    (desk / "gap-test.tsv.xz").write_bytes(lzma.compress(pairs.encode()))
    (desk / "litbank-coref.conll.xz").write_bytes(lzma.compress(novel.encode()))


PREPARE = {"export": prepare_export, "coherence": prepare_coherence}
"""What a page supposes that is not there."""


def long_commands(page: Path) -> list[list[str]]:
    """Words of the commands of a page that need minutes, in sh blocks or between backticks."""
    text = page.read_text("utf-8")
    found = [*commands(page), *re.findall(r"`(?:python )?(tools/[^`]+ [^`]+)`", text)]
    lines = [line.removeprefix("python ") for line in found]
    return [shlex.split(line) for line in lines if line.split()[0] in ELSEWHERE]


@pytest.mark.parametrize("page", [p for p in PAGES if long_commands(p)], ids=lambda p: p.stem)
def test_commands_that_need_minutes_are_understood(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their tools, and a comparison up to what it would train."""

    class Parsed(Exception):
        """In the place of the work."""

    def parsed(arguments: argparse.Namespace, *_: object) -> None:
        raise Parsed(arguments)

    monkeypatch.setattr(cli, "run", parsed)
    for program, *words in long_commands(page):
        monkeypatch.setattr(sys, "argv", [program, *words])
        with pytest.raises(Parsed) as found:
            runpy.run_path(str(ROOT / program))["main"]()
        asked = found.value.args[0]
        if program == "tools/compare.py" and asked.recipes:
            cells = cells_of(asked.recipes, asked.set, asked.seeds)
            budgets = {cell.recipe.name: budget(cell.recipe)[0] for cell in cells}
            require_matched(budgets, asked.matched)
    for program, place in ELSEWHERE.items():
        assert (ROOT / program).is_file() and (ROOT / place).exists()
