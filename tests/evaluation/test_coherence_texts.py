"""Where sentences, documents and spoilt documents come from, and what a tagger says of them."""

import re
import sys
from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sra_ds.data.tokenizer import END_OF_TEXT, end_of_text_id
from sra_ds.errors import BackendUnavailable, DataError
from sra_ds.evaluation.coherence import documents, sentences
from sra_ds.evaluation.coherence.anchors import (
    ANCHORS,
    WORD,
    gibberish,
    looped,
    sentence_shuffled,
    word_shuffled,
)
from sra_ds.evaluation.coherence.documents import (
    continued_sentences,
    human_passages,
    written_documents,
)
from sra_ds.evaluation.coherence.sentences import (
    paragraphs,
    plain,
    repeats,
    sentences_of,
    tokens,
    words,
)
from sra_ds.evaluation.coherence.tagging import Tagger

WIKITEXT = "\n".join([
    "", " = Homarus gammarus = ", " ",
    " Homarus , the lobster , is a <unk> of the sea . It weighs 0 @.@ 5 – 2 @.@ 2 kg ( 5 lb ) , and "
    "is red @-@ tipped . ",
    " ", " = = Life = = ", " ",
    " It does n't sing . The sea 's depths hold 1 @,@ 500 of them . ", "",
])  # fmt: skip
PLAIN = """The farmer sold his horse
to the miller. "It is old!" he said.

- a point without an end

Dr. Smith paid $5 (or 5.50).
"""
SENTENCES = [
    "The Farmer sold his horse to the miller of <unk> .",
    "The miller rode the horse home , slowly .",
    "His wife was not amused by the old horse .",
    "She sold it to a farmer in the village .",
    "The village laughed ; 0 @.@ 5 of it , at least .",
]


@pytest.fixture(scope="module")
def tagger() -> Tagger:
    return Tagger()


@pytest.fixture
def letters() -> Tokenizer:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([END_OF_TEXT, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def split_of(make_split, tokenizer: Tokenizer, texts: list[str]):
    return make_split([tokenizer.encode(text).ids for text in texts])


def article(number: int, sentences: int) -> str:
    return " ".join(f"Cat {number} saw dog {n} run." for n in range(sentences))


def test_sentences_of_wikitext_keep_their_form() -> None:
    assert sentences_of(WIKITEXT) == [
        "Homarus , the lobster , is a <unk> of the sea .",
        "It weighs 0 @.@ 5 – 2 @.@ 2 kg ( 5 lb ) , and is red @-@ tipped .",
        "It does n't sing .",
        "The sea 's depths hold 1 @,@ 500 of them .",
    ]


def test_the_plain_form_of_wikitext() -> None:
    assert [plain(sentence) for sentence in sentences_of(WIKITEXT)] == [
        "Homarus, the lobster, is a of the sea.",
        "It weighs 0.5 – 2.2 kg (5 lb), and is red-tipped.",
        "It doesn't sing.",
        "The sea's depths hold 1,500 of them.",
    ]
    for own in sentences_of(PLAIN):
        assert plain(own) == own


def test_sentences_of_text_as_people_write_it() -> None:
    assert sentences_of(PLAIN) == [
        "The farmer sold his horse to the miller.",
        '"It is old!" he said.',
        "- a point without an end",
        "Dr. Smith paid $5 (or 5.50).",
    ]
    assert sentences_of("") == sentences_of(" \n\n") == sentences_of(" . ! ? \n = Title = \n") == []


def test_blanks_and_wrapped_lines_change_nothing() -> None:
    text = "One cat sat. Two dogs\nran off! Did three birds sing?"
    spaced = text.replace(" ", "  ").replace("\n", " \n\t ")
    assert sentences_of(text) == sentences_of(spaced) == sentences_of(" ".join(text.split()))


def test_paragraphs_hold_the_whole_text() -> None:
    for text in (WIKITEXT, PLAIN, "no end", "\n\n"):
        assert "".join(paragraphs(text)) == text
    first, second = paragraphs(WIKITEXT)
    assert first.startswith("\n = Homarus") and second.strip().startswith("= = Life")


def test_tokens_and_words() -> None:
    assert tokens("The sea's well-known, isn't it?") == [
        "The", "sea", "'s", "well-known", ",", "is", "n't", "it", "?",
    ]  # fmt: skip
    assert words("The SEA's 5 % – well.") == ["the", "sea", "'s", "5", "well"]


def test_repetitions_are_word_for_word() -> None:
    assert repeats(["A cat.", "A dog.", "a  cat !", "A dog."]) == [False, False, True, True]


def test_the_splitter_is_named_or_asked_for(monkeypatch) -> None:
    assert sentences.splitter_name() == "pysbd 0.3.4"
    monkeypatch.setitem(sys.modules, "pysbd", None)
    sentences._segmenter.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"pip install 'sra_ds\[coherence\]'"):
        sentences_of("A cat.")
    sentences._segmenter.cache_clear()


def test_entities_are_nouns_and_names_by_lemma(tagger: Tagger) -> None:
    found = tagger("The old farmers of London 's <unk> sold Mary two mice .")
    assert found.entities == {"farmer", "london", "mary", "mouse"}
    assert found.content == found.entities | {"old", "sell"}
    assert tagger("It was , and then it was not .").content == frozenset()
    assert tagger("The  old farmers of London's sold\nMary two mice.") == found
    assert re.fullmatch(r"HanTa [\d.]+, morphmodel_en.pgz", tagger.name)


@pytest.mark.parametrize("name", ANCHORS)
def test_anchors_keep_the_number_of_sentences(name: str) -> None:
    spoilt = ANCHORS[name](SENTENCES)
    assert len(spoilt) == len(SENTENCES) and spoilt == ANCHORS[name](SENTENCES)
    assert (spoilt == SENTENCES) == (name == "human")
    assert ANCHORS[name](["Hm ."] * 2)[0].endswith(" .")


def test_what_anchors_spoil() -> None:
    def all_words(found: list[str]) -> list[str]:
        return [word for sentence in found for word in WORD.findall(sentence)]

    assert sorted(sentence_shuffled(SENTENCES)) == sorted(SENTENCES)
    mixed = word_shuffled(SENTENCES)
    assert Counter(all_words(mixed)) == Counter(all_words(SENTENCES))
    assert [WORD.sub("w", s) for s in mixed] == [WORD.sub("w", s) for s in SENTENCES]
    assert looped(SENTENCES) == [SENTENCES[0]] * 5
    noise = gibberish(SENTENCES)
    assert [[len(w) for w in WORD.findall(s)] for s in noise] == [
        [len(w) for w in WORD.findall(s)] for s in SENTENCES
    ]
    assert not set(all_words(noise)) & set(all_words(SENTENCES)) - {"a"}


def test_passages_come_in_turns(make_split, letters, monkeypatch) -> None:
    monkeypatch.setattr(documents, "TEXT_TOKENS", 110)
    long = f"{article(0, 9)}\n{article(1, 6)}\n\n = Title = \n\n{article(2, 5)}\n{article(3, 4)}\n"
    split = split_of(make_split, letters, [long, article(4, 4), article(5, 30)])
    found = human_passages(split, letters, most=9)
    assert [passage.source for passage in found] == [0, 2, 0, 0]
    assert found == human_passages(split, letters, most=9)
    own = {one.sentences[0]: one for one in found if one.source == 0}
    assert set(own) == {f"Cat {number} saw dog 0 run." for number in range(3)}
    # 20 letters and a blank before each: five fit into 110
    assert own["Cat 0 saw dog 0 run."].sentences == [f"Cat 0 saw dog {n} run." for n in range(5)]
    assert own["Cat 0 saw dog 0 run."].prompt == article(0, 9)[:64]
    titled = own["Cat 2 saw dog 0 run."]
    assert titled.prompt.lstrip().startswith("= Title =")
    assert titled.sentences[-1] == "Cat 2 saw dog 4 run.", "what does not fit ends the passage"
    assert [passage.source for passage in human_passages(split, letters, most=2)] == [0, 2]
    with pytest.raises(DataError, match="the split: no passage has 5 sentences within 110"):
        human_passages(split_of(make_split, letters, ["A cat.", ""]), letters, most=3)


def test_openings_are_no_more_likely_than_other_passages(make_split, letters, monkeypatch) -> None:
    monkeypatch.setattr(documents, "TEXT_TOKENS", 120)
    texts = ["\n".join(article(10 * n + part, 5) for part in range(8)) for n in range(40)]
    found = human_passages(split_of(make_split, letters, texts), letters, most=40)
    assert [passage.source for passage in found] == list(range(40))
    openings = sum(one.sentences[0].startswith(f"Cat {10 * one.source} ") for one in found)
    assert 4 <= openings <= 17


def test_the_ends_of_what_is_written_are_left_out() -> None:
    whole = "end of it. " + article(0, 6)
    assert continued_sentences(whole) == [f"Cat 0 saw dog {n} run." for n in range(6)]
    assert continued_sentences(whole + " And then the") == continued_sentences(whole)
    assert continued_sentences("one only.") == continued_sentences("") == []
    assert len(continued_sentences("end. " + article(0, 40))) == documents.MOST


def test_written_documents_say_which_were_too_short() -> None:
    class Writer:
        def continuations(self, prompts: list[str], most: int, seed: int) -> list[str]:
            assert most == documents.TEXT_TOKENS
            return [f"so. {article(seed, len(prompt))}" for prompt in prompts]

    passages = [documents.Passage(n, "x" * (4 + n), []) for n in range(3)]
    found, short = written_documents(Writer(), passages, seeds=2)
    assert short == 2 and [document.source for document in found] == [1, 2, 1, 2]
    assert found[2].sentences == [f"Cat 1 saw dog {n} run." for n in range(5)]


def test_the_letters_are_a_tokenizer_as_ours(letters) -> None:
    assert letters.decode(letters.encode("Né .").ids) == "Né ." and end_of_text_id(letters) == 0
