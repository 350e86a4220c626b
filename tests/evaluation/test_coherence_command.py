"""`tools/evaluate.py --coherence`, and whether human text comes out above what is spoilt."""

import itertools
import json
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from sra_ds.data.loader import IGNORED
from sra_ds.evaluation.coherence.anchors import ANCHORS
from sra_ds.evaluation.coherence.documents import Document
from sra_ds.evaluation.coherence.encoder import open_encoder
from sra_ds.evaluation.coherence.measures import COMPANIONS, MEASURES, Instruments, measure
from sra_ds.evaluation.coherence.tagging import Tagger

SCENES = (
    "farmer horse field barn fence cow milk cheese market",
    "judge court lawyer prison guard trial jury verdict appeal",
    "ship captain storm island harbour sailor anchor mast deck",
    "doctor patient hospital nurse surgery fever medicine ward cure",
    "painter canvas museum portrait gallery brush colour frame studio",
    "river bridge valley mountain village road forest lake stone",
    "violin concert orchestra singer stage melody opera choir drum",
    "soldier battle general army cannon fortress siege treaty victory",
)
ACTS = ("stood near", "belonged to", "came after", "was seen with", "had been found beside")
KINDS = ("human", "sentence_shuffled", "word_shuffled", "looped", "gibberish")


def story(number: int) -> list[str]:
    """Each sentence speaks of what the last one ended with."""
    rng = random.Random(number)
    things = SCENES[number % len(SCENES)].split()
    rng.shuffle(things)
    return [
        f"The {rng.choice(('old', 'new', 'famous', 'small'))} {a} {rng.choice(ACTS)} the {b}."
        for a, b in itertools.pairwise(things)
    ]


class EchoJudge:
    """Tokens are words; one that stood a few words before is likely."""

    name, window, opening, device = "echo", 200, 0, torch.device("cpu")
    reach = 9

    def __init__(self) -> None:
        self.number: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        found = text.lower().replace(".", " .").split()
        return [self.number.setdefault(word, len(self.number) + 1) for word in found]

    def token_nll(self, ids_BT: Tensor, targets_BT: Tensor, valid_BT: Tensor) -> Tensor:
        length = ids_BT.shape[1]
        back = torch.arange(length)[:, None] - torch.arange(length)
        near = (back >= 0) & (back < self.reach)
        echoed_BT = ((targets_BT[:, :, None] == ids_BT[:, None]) & near).any(-1)
        return (2.0 - echoed_BT.float()) * (targets_BT != IGNORED)


def same_vector(sentences: Sequence[str]):
    return np.ones((len(sentences), 1), np.float32)


def stories(documents: int) -> dict[str, list[Document]]:
    return {
        kind: [Document(number, spoil(story(number))) for number in range(documents)]
        for kind, spoil in ANCHORS.items()
    }


@pytest.fixture(scope="module")
def scores():
    pytest.importorskip("transformers")
    encoder = open_encoder(lambda: ([], ""), torch.device("cpu"))
    return measure(stories(48), Instruments(EchoJudge(), encoder.encode, Tagger()))


@pytest.mark.parametrize("name", MEASURES)
def test_human_text_is_above_gibberish_and_loops(scores, name: str) -> None:
    for kind in KINDS:
        own = scores[kind][name]
        assert 0 <= own["low"] <= own["value"] <= own["high"] <= 1 and own["documents"] == 48
    human = scores["human"][name]
    for kind in ("looped", "gibberish"):
        assert scores[kind][name]["high"] < human["low"], kind


def test_order_is_lost_when_sentences_are_shuffled() -> None:
    found = measure(stories(200), Instruments(EchoJudge(), same_vector, Tagger()))
    human, shuffled = found["human"], found["sentence_shuffled"]
    for name in ("entity", "discourse"):
        assert human[name]["low"] > shuffled[name]["high"]
        assert shuffled[name]["value"] == pytest.approx(0.5, abs=0.05)
    once, again = (
        measure(stories(20), Instruments(EchoJudge(), same_vector, Tagger())) for _ in range(2)
    )
    assert once == again


def test_what_gibberish_and_loops_share(scores) -> None:
    for name in ("semantic", "lexical"):
        assert scores["gibberish"][name]["value"] < 0.2
    assert scores["looped"]["companions"]["entity_overlap"] == 1
    assert scores["gibberish"]["companions"]["without_shared_entities"] > 0.9
    assert scores["human"]["companions"]["without_shared_entities"] == 0
    assert set(scores["human"]["companions"]) == set(COMPANIONS)


def test_a_single_sentence_has_no_coherence() -> None:
    documents = {"human": [Document(n, [story(n)[0]]) for n in range(3)]}
    found = measure(documents, Instruments(EchoJudge(), same_vector, Tagger()))["human"]
    for name in MEASURES:
        assert found[name] == {"value": None, "low": None, "high": None, "documents": 0}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "stories.jsonl"
    stories = [" ".join(story(number)) for number in range(14)]
    path.write_text("".join(json.dumps({"text": own}) + "\n" for own in stories))
    return path


@pytest.fixture
def run(make_run, corpus):
    """Of a model that may look back 200 tokens."""
    data = corpus[0].model_dump(mode="json") | {"sequence_length": 200}
    return make_run("dense", {"data": data})


@pytest.fixture
def gap(tmp_path):
    path = tmp_path / "gap.tsv"
    path.write_text(
        "ID\tText\tPronoun\tPronoun-offset\tA\tA-coref\tB\tB-coref\n"
        "1\tAnn met Bea when she sang.\tshe\t17\tAnn\tTRUE\tBea\tFALSE\n"
    )
    return path


@pytest.fixture
def litbank(tmp_path):
    path = tmp_path / "novel.conll"
    sentence = "novel\t0\t0\tcat\t(1)\nnovel\t0\t1\tsat\t_"
    path.write_text(f"#begin document (novel); part 0\n{sentence}\n\n{sentence}\n\n#end document\n")
    return path


def test_the_command_writes_what_it_says(run, text, call, make_run, gap, litbank) -> None:
    other = make_run("moe-cosine", name="other").path
    options = ("--coherence", "--text", text, "--documents", 9, "--seeds", 2, "--json")
    found = call("evaluate", "--run", run.path, *options, "--baseline", other).tree
    assert json.loads((run.evaluation / "coherence-stories.json").read_text()) == found
    assert (run.figures / "coherence-stories.png").stat().st_size > 5000
    assert found["notes"] == ["discourse: the run judges its rival; a third model does by --judge"]
    assert list(found["scores"]) == ["generated", "baseline", *KINDS]
    assert found["text"] == "stories.jsonl" and found["settings"]["passages"] == 9
    short = found["settings"]["too_short"]
    for kind, own in found["scores"].items():
        documents = 18 - short[kind] if kind in short else 9
        assert all(own[name]["documents"] <= documents for name in MEASURES)
        assert own["lexical"]["documents"] == documents
    assert found["scores"]["human"]["entity"]["value"] > 0.7
    made_with = found["made_with"]
    assert str(run.path) in made_with["judge"] and "MiniLM" in made_with["encoder"]
    assert str(other) in made_with["writers"]["baseline"]
    assert set(found["connective_cloze"]) == {"generated", "baseline"} and "gap" not in found
    again = call("evaluate", "--run", run.path, *options, "--baseline", other).tree
    assert again == found
    labelled = ("--gap", gap, "--litbank", litbank)
    judged = call("evaluate", "--run", run.path, *options, "--judge", other, *labelled).tree
    assert str(other) in judged["made_with"]["judge"] and "notes" in judged
    assert (run.evaluation / "coherence-stories-by-other.json").is_file()
    assert set(judged["connective_cloze"]) == set(judged["gap"]) == {"generated", "judge"}
    assert judged["gap"]["judge"]["pronouns"] == 1 and judged["litbank"]["recall"]["value"] == 1
    human, same = found["scores"]["human"], judged["scores"]["human"]
    assert human["entity"] == same["entity"] and human["lexical"] == same["lexical"]
    assert human["semantic"]["value"] == pytest.approx(same["semantic"]["value"], abs=1e-5)
    assert human["discourse"] != same["discourse"]


def test_what_cannot_be_scored_is_refused(run, text, call, tmp_path) -> None:
    command = ("evaluate", "--run", run.path)
    call(*command, "--coherence").refused("no passage has 5 sentences within 256 tokens")
    options = (*command, "--coherence", "--text", text)
    call(*options, "--baseline", tmp_path).refused("--baseline", "neither a run")
    call(*options, "--judge", tmp_path / "no").refused("--judge", "neither a run")
    call(*options, "--gap", tmp_path / "no.tsv").refused("no.tsv", "cannot be read")
    call(*options, "--litbank", text).refused("no coreference chains")
    call(*options, "--documents", 0).refused("--documents")
    call(*command, "--gap", text).refused("--gap goes with --coherence")
    call(*options, "--stride", 9).refused("--stride has no effect with --coherence")
    call(*options, "--legacy-sra").refused("--legacy-sra has no effect with --coherence")
    assert not list(run.evaluation.glob("coherence*"))
