"""What language models are asked: rows of tokens, orders of sentences, connectives, pronouns."""

import json
import lzma
import math

import pytest
import torch
from torch import Tensor

from sra_ds.data.loader import IGNORED
from sra_ds.errors import ConfigError, DataError
from sra_ds.evaluation.coherence.cloze import CONNECTIVES, connective_cloze, gaps_of
from sra_ds.evaluation.coherence.discourse import discourse
from sra_ds.evaluation.coherence.documents import Passage
from sra_ds.evaluation.coherence.gap import gap_accuracy, is_possessive, read_gap
from sra_ds.evaluation.coherence.litbank import count, litbank_agreement, read_litbank
from sra_ds.evaluation.coherence.models import RunModel, open_model
from sra_ds.evaluation.coherence.scoring import Row, row_nll
from sra_ds.evaluation.coherence.tagging import Tagger
from sra_ds.inference.load import load_run

CPU = torch.device("cpu")


class WordJudge:
    """Tokens are words. A word costs `cost(words before it, word)`; rows that were scored are kept."""

    name, window, opening, device = "words", 60, 0, CPU

    def __init__(self, cost) -> None:
        self.cost = cost
        self.known = ["<open>"]
        self.rows: list[str] = []

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.known:
                self.known.append(word)
        return [self.known.index(word) for word in text.split()]

    def token_nll(self, ids_BT: Tensor, targets_BT: Tensor, valid_BT: Tensor) -> Tensor:
        nll_BT = torch.zeros(ids_BT.shape)
        for row, (ids, targets, valid) in enumerate(zip(ids_BT, targets_BT, valid_BT, strict=True)):
            words = [self.known[i] for i in ids[valid]]
            self.rows.append(" ".join(words[1:]))
            for at, target in enumerate(targets[valid].tolist()):
                if target != IGNORED:
                    nll_BT[row, at] = self.cost(words[1 : at + 1], self.known[target])
        return nll_BT


def in_counted_order(before: list[str], word: str) -> float:
    """Cheap where numbers follow each other."""
    numbers = [int(own) for own in before if own.isdigit()]
    return 0.0 if not word.isdigit() or (numbers or [-1])[-1] == int(word) - 1 else 1.0


@pytest.fixture(scope="module")
def tagger() -> Tagger:
    return Tagger()


@pytest.fixture
def dense(make_run):
    return RunModel(load_run(make_run("dense").path), CPU)


def test_rows_are_scored_as_one_by_one(dense) -> None:
    rng = torch.Generator().manual_seed(0)
    sizes = [7, 1, 40, 7, 23, 2, 13]
    tokens = [torch.randint(1, 200, (size,), generator=rng).tolist() for size in sizes]
    rows = [Row([own[:3], own[3:]], given) for own, given in zip(tokens, range(7), strict=True)]
    found = row_nll(dense, rows, "rows")
    for own, row, nll in zip(tokens, rows, found, strict=True):
        ids = torch.tensor([[dense.opening, *own]])
        with torch.no_grad():
            logits = dense.model(ids[:, :-1]).logits[0].log_softmax(-1)
        each = -logits[torch.arange(len(own)), ids[0, 1:]]
        assert nll == pytest.approx(float(each[row.given :].sum()), rel=1e-4, abs=1e-5)
    assert (found == row_nll(dense, rows, "rows")).all()
    assert row_nll(dense, [], "rows").shape == (0,)


def test_a_run_goes_on_as_generate_does(dense) -> None:
    texts = dense.continuations(["ab", "cd ef"] * 10, 6, seed=3)
    assert len(texts) == 20 and texts == dense.continuations(["ab", "cd ef"] * 10, 6, seed=3)
    assert texts != dense.continuations(["ab", "cd ef"] * 10, 6, seed=4)
    assert texts[0] == texts[2] and dense.window == 16


def test_discourse_knows_the_order_that_its_judge_expects() -> None:
    sentences = [f"{number} ." for number in range(6)]
    judge = WordJudge(in_counted_order)
    mixed = [sentences[i] for i in (3, 0, 4, 5, 2, 1)]
    right, wrong, looped, single = discourse(judge, [sentences, mixed, ["1 ."] * 4, ["1 ."]])
    assert right == 1 and 0.1 < wrong < 0.9
    assert looped == 0 and math.isnan(single)
    assert len(set(judge.rows)) == len(judge.rows) <= 22, "an order is scored once"
    spaced = [sentence.replace(" ", " \n ") for sentence in sentences]
    assert discourse(judge, [spaced]) == [1.0]


def test_discourse_takes_what_fits_into_the_window() -> None:
    judge = WordJudge(in_counted_order)
    judge.window = 7  # three sentences of two words beside the opening
    sentences = ["0 .", "1 .", "2 .", "5 .", "4 ."]
    assert discourse(judge, [sentences]) == [1.0]
    assert {len(row.split()) for row in judge.rows} == {5}
    judge.window = 4
    assert math.isnan(discourse(judge, [sentences])[0]), "one sentence has no order"
    judge.window = 1
    assert math.isnan(discourse(judge, [sentences])[0])


def test_connectives_are_found_where_they_join() -> None:
    passage = Passage(3, "", [
        "However , this is the first .",
        "It rained , so we left .",
        "He was so tired but slept not .",
        "For example , cats .",
        "Then , although late , but",
        "Soft ones , sofas .",
    ])  # fmt: skip
    found = gaps_of(passage)
    assert [CONNECTIVES[gap.true] for gap in found] == ["so", "for example", "then"]
    assert found[0].before == "It rained , " and found[0].after == " we left ."
    assert found[0].context == "However , this is the first ." and found[0].source == 3


def test_the_cloze_asks_for_the_whole_sentence() -> None:
    passages = [
        Passage(n, "", ["It rained .", "But we left .", "Also , we ran .", "We sat , but ."])
        for n in range(3)
    ]
    likes_but = WordJudge(lambda before, word: float(word.lower() != "but"))
    found = connective_cloze(likes_but, passages)
    assert found["accuracy"]["value"] == pytest.approx(2 / 3) == found["always_the_most_frequent"]
    assert found["sentences"] == 9 and found["chance"] == 0.1
    assert "It rained . But we left" in likes_but.rows
    assert "It rained . But we left . Also , we ran . We sat , although" in likes_but.rows
    knows = WordJudge(
        lambda before, word: float((before[-1:] or [""])[0].lower() != "also" and word == ",")
    )
    assert connective_cloze(knows, passages[:1])["accuracy"]["value"] == 1 / 3
    nothing = connective_cloze(likes_but, [Passage(0, "", ["A .", "B ."])])
    assert nothing["accuracy"]["value"] is None and nothing["sentences"] == 0


GAP_ROWS = [
    ("Ann met Bea when she sang to Bea.", "she", "Ann", "TRUE", "Bea", "FALSE"),
    ("Ann met Bea when she sang to Ann.", "she", "Ann", "FALSE", "Bea", "TRUE"),
    ("Tom saw Max with his old dog and Max.", "his", "Tom", "TRUE", "Max", "FALSE"),
    ('Ann told "Bea that Cid saw her there with Cid.', "her", "Ann", "FALSE", "Bea", "FALSE"),
]


def write_gap(path, rows=GAP_ROWS):
    lines = ["\t".join(["ID", "Text", "Pronoun", "Pronoun-offset", "A", "A-coref", "B", "B-coref"])]
    for number, (text, pronoun, a, right_a, b, right_b) in enumerate(rows):
        at = str(text.index(f" {pronoun} ") + 1)
        lines.append("\t".join([f"x-{number}", text, pronoun, at, a, right_a, b, right_b]))
    with lzma.open(path, "wt", encoding="utf-8") as stream:
        stream.write("\n".join(lines) + "\n")
    return path


def test_pronouns_are_resolved_by_what_follows(tmp_path, tagger) -> None:
    cases = read_gap(write_gap(tmp_path / "gap.tsv.xz"))
    assert [(case.right, case.wrong) for case in cases] == [
        ("Ann", "Bea"), ("Bea", "Ann"), ("Tom", "Max"),
    ]  # fmt: skip
    assert [is_possessive(case, tagger) for case in cases] == [False, False, True]

    def same_name(before: list[str], word: str) -> float:
        name = word.strip(".")
        return float(name.istitle() and name in [own.removesuffix("'s") for own in before[-7:]])

    judge = WordJudge(lambda before, word: same_name(before[3:], word))
    found = gap_accuracy(judge, cases, tagger)
    assert found["all"]["value"] == found["masculine"]["value"] == found["feminine"]["value"] == 1
    assert found["pronouns"] == 3 and found["chance"] == 0.5
    assert "Tom saw Max with Tom's old dog and" in judge.rows
    indifferent = WordJudge(lambda before, word: 1.0)
    assert gap_accuracy(indifferent, cases, tagger)["all"] == {
        "value": 0.5, "low": 0.5, "high": 0.5,
    }  # fmt: skip
    judge.window = 8
    judge.rows.clear()
    gap_accuracy(judge, cases, tagger)
    assert "Max with Tom's old dog and" in judge.rows, "four words of each side fit"


@pytest.mark.parametrize("text", ["", "a\tb\nc\td\n", "\x00"])
def test_what_is_no_gap_file_is_refused(tmp_path, text: str) -> None:
    (tmp_path / "x.tsv").write_text(text)
    with pytest.raises(DataError, match=r"x.tsv is no file of GAP"):
        read_gap(tmp_path / "x.tsv")


NOVEL = [
    [("The", "(1"), ("lord", ""), ("of", ""), ("Kent", "1)|(2)"), ("saw", ""), ("cats", "(3)")],
    [("The", "(1"), ("lord", "1)"), ("fed", ""), ("a", "(4"), ("cat", "4)")],
    [("He", "(1)"), ("and", ""), ("Mary", "(5"), ("Kent", "5)"), ("left", "")],
]


def write_novel(path, copies: int = 1):
    lines = []
    for number in range(copies):
        lines.append(f"#begin document (novel{number}); part 0")
        for sentence in NOVEL:
            for at, (form, chain) in enumerate(sentence):
                lines.append(
                    "\t".join([f"novel{number}", "0", str(at), form, *"_" * 8, chain or "_"])
                )
            lines.append("")
        lines.append("#end document")
    path.write_text("\n".join(lines))
    return path


def test_lemmas_against_chains(tmp_path, tagger) -> None:
    (novel,) = read_litbank(write_novel(tmp_path / "one.conll"))
    assert [sentence.forms[0] for sentence in novel] == ["The", "The", "He"]
    assert set(novel[0].mentions) == {(0, 3, 1), (3, 3, 2), (5, 5, 3)}
    # one lemma: lord-lord, Kent-Kent, cats-cat; one chain: lord-lord
    assert count(novel, tagger) == (3, 1, 1, 6, 7)
    found = litbank_agreement(read_litbank(write_novel(tmp_path / "two.conll", 2)), tagger)
    assert found["precision"]["value"] == pytest.approx(1 / 3) == found["precision"]["low"]
    assert found["recall"]["value"] == 1 and found["documents"] == 2
    assert found["mentions_with_a_noun_or_name"]["value"] == pytest.approx(6 / 7)
    (tmp_path / "no.conll").write_text("#begin document (x); part 0\nx\t0\t0\tHe\t_\n")
    with pytest.raises(DataError, match="no coreference chains"):
        read_litbank(tmp_path / "no.conll")


@pytest.fixture
def gpt2(tmp_path, make_run):
    """A folder as transformers saves it: a tiny model of random weights with our tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizer = load_run(make_run("dense").path).tokenizer
    config = transformers.GPT2Config(
        vocab_size=320,
        n_positions=48,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    mark = "<|endoftext|>"
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=mark, eos_token=mark
    )
    model.save_pretrained(tmp_path / "gpt2")
    fast.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2", model.eval()


def test_a_model_of_transformers_answers_the_same_questions(gpt2) -> None:
    path, direct = gpt2
    model = open_model(path, "--judge", CPU)
    assert model.window == 48 and model.name == f"{path}, GPT2LMHeadModel"
    own = model.encode("abc def")
    assert own and model.opening not in own
    ids = torch.tensor([[model.opening, *own]])
    with torch.no_grad():
        expected = direct(ids[:, :-1]).logits.log_softmax(-1)[0, torch.arange(len(own)), ids[0, 1:]]
    nll = row_nll(model, [Row([own]), Row([own, own])], "rows")
    assert nll[0] == pytest.approx(-float(expected.sum()), rel=1e-5)
    texts = model.continuations(["abc def", "a"] * 10, 12, seed=1)
    assert texts == model.continuations(["abc def", "a"] * 10, 12, seed=1) and len(texts) == 20
    assert texts != model.continuations(["abc def", "a"] * 10, 12, seed=2)
    state = torch.random.get_rng_state()
    model.continuations(["abc"], 3, seed=1)
    assert torch.equal(state, torch.random.get_rng_state()), "nobody else's numbers are drawn"
    assert model.continuations(["abc " * 60], 12, seed=1) == [""], "no room in its window"


def test_folders_without_a_model_are_refused(gpt2, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"--judge \S+nowhere is neither a run"):
        open_model(tmp_path / "nowhere", "--judge", CPU)
    path, _ = gpt2
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"--baseline .* no causal language model that can be read"
    ):
        open_model(path, "--baseline", CPU)
    (path / "config.json").write_text(
        json.dumps({"model_type": "sra", "auto_map": {"AutoConfig": "x.Y"}})
    )
    with pytest.raises(ConfigError, match="no causal language model"):
        open_model(path, "--baseline", CPU)
    (path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="no causal language model"):
        open_model(path, "--baseline", CPU)


def test_a_folder_with_a_broken_file_or_a_tokenizer_that_is_not_its_own_is_refused(gpt2) -> None:
    path, _ = gpt2
    weights, tokenizer = path / "model.safetensors", path / "tokenizer.json"
    whole, own = weights.read_bytes(), tokenizer.read_text()
    weights.write_bytes(whole[:1000])
    with pytest.raises(ConfigError, match=r"--judge .*: no causal language model that can be read"):
        open_model(path, "--judge", CPU)
    weights.write_bytes(whole)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "n_embd": 32}))
    with pytest.raises(ConfigError, match="no causal language model that can be read"):
        open_model(path, "--judge", CPU)
    (path / "config.json").write_text(json.dumps(config))
    tree = json.loads(own)
    tree["model"]["vocab"] = {token: 9 * n for token, n in tree["model"]["vocab"].items()}
    tree["added_tokens"] = []
    tokenizer.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="its tokenizer is missing or another model's"):
        open_model(path, "--judge", CPU)
    for file in path.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match="--judge "):
        open_model(path, "--judge", CPU)


def test_a_model_that_reads_ahead_is_refused(gpt2, tmp_path) -> None:
    import transformers

    path, _ = gpt2
    bert = transformers.BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=48, is_decoder=False,
    )  # fmt: skip
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    for file in path.glob("*token*"):
        file.rename(tmp_path / "bert" / file.name)
    with pytest.raises(ConfigError, match="what it says of a token depends on later ones"):
        open_model(tmp_path / "bert", "--judge", CPU)
