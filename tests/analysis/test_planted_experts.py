"""Experts whose words are known by construction are found, and an untrained router has none."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from saved_runs import save_run
from sra_ds.analysis.analysis import Analysis, Request, analyse
from sra_ds.config import Recipe
from sra_ds.config.data import TextConfig
from sra_ds.data.prepare import prepare
from sra_ds.data.shards import TokenCorpus
from sra_ds.data.tokenizer import load_tokenizer
from sra_ds.inference.load import load_run
from sra_ds.model.language_model import LanguageModel, build_model

GROUPS = {
    "months": "January February March April June July August September October November",
    "numbers": "two three four five six seven eight nine ten twelve",
    "colours": "red green blue yellow black white brown purple pink grey",
    "animals": "dogs cats horses cows pigs goats birds lions tigers wolves",
    "pronouns": "he she they we you him them us me it",
    "prepositions": "in on at of with from by under near behind",
    "verbs": "saw told asked heard found met left helped followed liked",
}
WORDS = {name: words.split() for name, words in GROUPS.items()}
MARKS = len(GROUPS)
"""The expert of everything else: punctuation and the marks that open documents."""
CONTENT = ("months", "numbers", "colours", "animals")
TEMPLATES = {
    "months": "{prepositions} {months} , {months} and {months} or {months} .",
    "numbers": "{numbers} and {numbers} or {numbers} , {verbs} {numbers} .",
    "colours": "{colours} , {colours} and {colours} , {prepositions} {colours} .",
    "animals": "{animals} {verbs} {animals} and {animals} , {prepositions} {animals} .",
    "pronouns": "{pronouns} {verbs} {pronouns} and {pronouns} {verbs} {pronouns} .",
}
VOCABULARY, WIDTH, EXPERTS, SEEDS = 700, 16, 8, 6
Corpus = tuple[TextConfig, TokenCorpus]
CPU = torch.device("cpu")


def document(rng: random.Random) -> str:
    """Twenty sentences on three subjects; every word has a space before it, also the first."""
    subjects = rng.sample(list(TEMPLATES), 3)
    sentences = []
    for _ in range(20):
        parts = TEMPLATES[rng.choice(subjects)].split()
        sentences.append([rng.choice(WORDS[p[1:-1]]) if p[1:-1] in WORDS else p for p in parts])
    return "".join(f" {word}" for sentence in sentences for word in sentence)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """300 documents for training, 100 held out; every word is one token."""
    folder, rng = tmp_path_factory.mktemp("planted"), random.Random(0)
    for name, documents in (("train", 300), ("valid", 100)):
        lines = (f'{{"text": "{document(rng)}"}}\n' for _ in range(documents))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    config = TextConfig.model_validate(
        {
            "train": [str(folder / "train.jsonl")],
            "valid": [str(folder / "valid.jsonl")],
            "sequence_length": 64,
            "directory": str(folder),
            "tokenizer": {"vocab_size": VOCABULARY},
        }
    )
    return config, prepare(config, progress=False)


@pytest.fixture(scope="module")
def make_recipe(tiny_recipe: Callable[..., Recipe], corpus: Corpus) -> Callable[..., Recipe]:
    """Eight experts, one per token."""

    def make(seed: int = 0, layers: int = 1) -> Recipe:
        model = {"width": WIDTH, "layers": layers, "channel": {"experts": EXPERTS, "top_k": 1}}
        data = corpus[0].model_dump(mode="json")
        return tiny_recipe(overlay={"model": model, "data": data, "training": {"seed": seed}})

    return make


@torch.no_grad()
def plant(model: LanguageModel, tokens: dict[str, int]) -> None:
    """Tokens of a group are one direction, which is its expert's anchor; attention adds nothing."""
    (block,) = model.blocks
    for parameter in block.mixer.parameters():
        parameter.zero_()
    directions = torch.eye(WIDTH)
    model.embedding.weight.copy_(directions[MARKS].expand(VOCABULARY, -1))
    for expert, words in enumerate(WORDS.values()):
        for word in words:
            model.embedding.weight[tokens[f"\u0120{word}"]] = directions[expert]
    block.channel.moe.router.anchors.copy_(directions[:EXPERTS] - 1 / WIDTH)


def analysed(model: LanguageModel, recipe: Recipe, corpus: Corpus, folder: Path) -> Analysis:
    """The model as a saved run, and its analysis."""
    run = save_run(folder, recipe, corpus[1], model)
    return analyse(load_run(run.path), Request(sweep_tokens=0), CPU)


@pytest.fixture(scope="module")
def planted(
    make_recipe: Callable[..., Recipe], corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> Analysis:
    """The analysis of a model with planted experts."""
    recipe = make_recipe()
    model = build_model(recipe)
    plant(model, load_tokenizer(corpus[1].tokenizer_file, VOCABULARY).get_vocab())
    return analysed(model, recipe, corpus, tmp_path_factory.mktemp("runs") / "planted")


def test_the_words_of_every_expert_are_found(planted: Analysis) -> None:
    """Its ten top words and tokens are its group, and nothing of the group goes elsewhere."""
    for profile, (name, words) in zip(planted.profiles[0], WORDS.items(), strict=False):
        assert set(profile.top_words) == {word.lower() for word in words}, name
        assert set(profile.top_tokens) == {f"\u00b7{word}" for word in words}, name
        assert profile.vocabulary_specialisation == 1.0 and profile.partner is None
        assert profile.mean_score == pytest.approx(10.0)  # the temperature
        assert profile.mean_margin == pytest.approx(10 * (1 + 1 / (WIDTH - 1)))
    marks = planted.profiles[0][MARKS]
    assert set(marks.top_tokens) == {"\u00b7,", "\u00b7.", "\u00b7and", "\u00b7or", "<|endoftext|>"}
    assert set(marks.top_words) == {"and", "or"}


def test_the_nearest_vocabulary_is_the_group(planted: Analysis) -> None:
    for profile, words in zip(planted.profiles[0], WORDS.values(), strict=False):
        assert set(profile.nearest_tokens) == {f"\u00b7{word}" for word in words}


def test_content_is_coherent_and_semantic(planted: Analysis) -> None:
    """Beyond the 99 % null of other words of the same frequencies."""
    for name in CONTENT:
        profile = planted.profiles[0][list(WORDS).index(name)]
        coherence = profile.coherence
        assert coherence.p <= 0.01 and coherence.p_adjusted <= 0.01, name
        assert coherence.value > coherence.null_95 and coherence.low > coherence.null_95, name
        assert profile.kind == "semantic", name


def test_grammar_is_told_from_meaning(planted: Analysis) -> None:
    """Pronouns are as coherent as months, and yet of a closed class; so are prepositions, which stand
    alone in their sentences."""
    pronouns = planted.profiles[0][list(WORDS).index("pronouns")].coherence
    assert pronouns.p <= 0.01 and pronouns.low > pronouns.null_95
    for name, kind in (("pronouns", "pronoun"), ("prepositions", "preposition")):
        profile = planted.profiles[0][list(WORDS).index(name)]
        assert profile.kind == "syntactic" and profile.specialisation.startswith(
            f"syntactic: {kind}"
        )
        assert max(profile.classes, key=lambda c, own=profile.classes: own[c]) == kind
        assert profile.function_share > 0.9
    assert planted.profiles[0][MARKS].kind == "syntactic"
    largest = [max(p.classes, key=lambda c, own=p.classes: own[c]) for p in planted.profiles[0][:4]]
    assert largest == ["name", "number", "adjective", "noun"]


def test_the_layer_is_measured_as_it_was_built(planted: Analysis) -> None:
    """Each token type has one expert, and no two experts share one."""
    measures = planted.measures[0]
    shares = planted.loads[0] / planted.loads[0].sum()
    assert measures["token_divergence"].value == pytest.approx(1.0, abs=1e-5)
    assert measures["vocabulary_specialisation"].value == 1.0
    assert measures["vocabulary_specialisation"].chance == pytest.approx((shares**2).sum())
    for name in ("token_information", "token_divergence", "syntax_information"):
        assert measures[name].p == 0.01, name
    assert "domain_information" not in measures  # the corpus has two, this text one
    assert measures["coherent_share"].value >= 5 / 8 and measures["coherent_share"].low > 0.05


def test_an_untrained_router_has_no_specialists(
    make_recipe: Callable[..., Recipe], corpus: Corpus, tmp_path: Path
) -> None:
    """Models with initial weights on the same text: as many experts above the 95 % null as chance has
    it, and none that is semantic."""
    above, tested, kinds, over = 0, 0, set(), []
    for seed in range(SEEDS):
        recipe = make_recipe(seed + 1, layers=2)
        found = analysed(build_model(recipe), recipe, corpus, tmp_path / str(seed))
        over += [layer["coherence_over_untrained"] for layer in found.measures]
        for profile in (p for layer in found.profiles for p in layer):
            kinds.add(profile.kind)
            if np.isfinite(profile.coherence.p):
                tested += 1
                above += profile.coherence.value > profile.coherence.null_95
    assert tested > 0.8 * SEEDS * 2 * EXPERTS
    assert binomtest(above, tested, 0.05, alternative="greater").pvalue > 0.05
    assert "semantic" not in kinds
    assert min(one.p_adjusted for one in over) > 0.05
    assert abs(np.mean([one.value for one in over]) - 0.5) < 0.15
