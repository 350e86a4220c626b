"""The published protocol, reproduced: paragraphs in padded blocks, padding scored like words."""

import math
import re

import pytest
import torch
from tokenizers import Tokenizer, models

from sra_ds.data.tokenizer import train_tokenizer
from sra_ds.evaluation.legacy import (
    BATCH,
    BLOCK,
    SHORTEST,
    document_texts,
    legacy_sra,
    padded_blocks,
    split_paragraphs,
    target_kinds,
)
from sra_ds.model.language_model import ModelOutput

CPU = torch.device("cpu")
WORDS = ("anchor", "cosine", "expert", "gate", "router", "token", "the", "of")
TEXTS = [
    " = Title = \n"
    + "\n".join(" ".join(WORDS[(n * k + k) % 8] for k in range(n)) for n in (40, 150, 10, 300, 700))
    + "\n = = Section = = \n"
    + "one <unk> two  three " * 60
    + "\n",
    "\n".join(" ".join(WORDS[(3 * k + n) % 8] for k in range(160 + n)) for n in range(150)),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, 300)


@pytest.fixture
def split(tokenizer, make_split):
    """The texts as a split whose documents the protocol decodes again."""
    return make_split([tokenizer.encode(text).ids for text in TEXTS])


def naive_blocks(texts: list[str], tokenizer) -> list[list[int]]:
    """The protocol, step by step as its description has it."""
    blocks = []
    for line in "\n".join(texts).split("\n"):
        if re.fullmatch(r"\s*=+.*=+\s*", line):
            continue
        cleaned = re.sub(r"\s+", " ", line.replace("<unk>", " ")).strip()
        ids = tokenizer.encode(cleaned).ids if cleaned else []
        while ids:
            block, ids = ids[:256], ids[256:]
            if len(block) >= 128:
                while len(block) < 256:
                    block.append(0)
                blocks.append(block)
    return blocks


def losses(real: float, first_pad: float, later_pad: float):
    """A model with one loss per kind of target."""

    def model(ids_BT: torch.Tensor, targets_BT: torch.Tensor) -> ModelOutput:
        pad = targets_BT == 0
        nll = torch.where(pad, torch.where(ids_BT == 0, later_pad, first_pad), real)
        return ModelOutput([], {}, [], [], [], {}, token_nll_BT=nll, correct_BT=pad)

    return model


def report(model, split, tokenizer, **options):
    found = legacy_sra(model, split, tokenizer, False, CPU, **options)
    assert found is not None
    return found


def test_constants_are_the_published_ones():
    assert (BLOCK, SHORTEST, BATCH) == (256, 128, 128)


def test_documents_come_back_as_text(split, tokenizer):
    assert list(document_texts(split, tokenizer)) == TEXTS


def test_blocks_equal_a_naive_reimplementation(split, tokenizer):
    paragraphs = [
        p for text in document_texts(split, tokenizer) for p in split_paragraphs(text, False)
    ]
    blocks = padded_blocks(paragraphs, tokenizer)
    assert blocks == naive_blocks(TEXTS, tokenizer)
    assert len(blocks) > BATCH
    assert {len(block) for block in blocks} == {BLOCK}
    assert any(0 in block for block in blocks)


def test_paragraphs_are_lines_or_parted_by_blank_lines():
    text = " = Head = \nfirst\nline <unk>  more\n \n\n== Sub ==\n\nsecond\n"
    assert split_paragraphs(text, blank_line=False) == ["first", "line more", "second"]
    wrapped = "first\nline\n \nsecond\n\n\n= H =\n\nthird"
    assert split_paragraphs(wrapped, blank_line=True) == ["first line", "second", "third"]
    assert split_paragraphs("\n \n", blank_line=False) == []


def test_blocks_at_the_edge_of_the_shortest_length(tokenizer):
    letters = {n: " ".join("é" for _ in range(n)) for n in range(1, 300)}
    lengths = {n: len(tokenizer.encode(text).ids) for n, text in letters.items()}
    short = max(n for n in lengths if lengths[n] < SHORTEST)
    long = min(n for n in lengths if lengths[n] >= SHORTEST)
    assert padded_blocks([letters[short]], tokenizer) == []
    (block,) = padded_blocks([letters[long]], tokenizer)
    assert block[lengths[long] :] == [0] * (BLOCK - lengths[long])


def test_target_kinds_tell_the_first_padding_from_the_rest():
    targets = torch.tensor([[5, 3, 0, 0, 0], [1, 1, 1, 1, 1], [4, 4, 4, 4, 0]])
    assert target_kinds(targets).tolist() == [[0, 0, 1, 2, 2], [0] * 5, [0, 0, 0, 0, 1]]


def test_kinds_add_up_to_all_targets(split, tokenizer):
    blocks = naive_blocks(TEXTS, tokenizer)
    found = report(losses(2.0, 1.0, 0.5), split, tokenizer)
    targets = [block[1:] for block in blocks]
    pads = sum(block.count(0) for block in targets)
    assert found["blocks"] == len(blocks)
    assert found["first_pad"]["targets"] == sum(0 in block for block in targets)
    assert found["first_pad"]["targets"] + found["later_pad"]["targets"] == pads
    assert found["real"]["targets"] + pads == 255 * len(blocks)
    assert found["pad_share"] == pytest.approx(pads / (255 * len(blocks)), rel=1e-12)
    assert 0 < found["pad_share"] < 1
    means = {kind: found[kind]["nll_per_target"] for kind in ("real", "first_pad", "later_pad")}
    assert means == pytest.approx({"real": 2.0, "first_pad": 1.0, "later_pad": 0.5})
    assert found["real_token_perplexity"] == pytest.approx(math.exp(2.0))
    free = 2.0 * found["real"]["targets"] + found["first_pad"]["targets"]
    assert found["perplexity_if_padding_were_free"] == pytest.approx(
        math.exp(free / (255 * len(blocks)))
    )


def test_free_padding_deflates_by_the_share_of_padding(split, tokenizer):
    found = report(losses(3.5, 0.0, 0.0), split, tokenizer, max_blocks=BATCH)
    real, share = found["real_token_perplexity"], found["pad_share"]
    assert real == pytest.approx(math.exp(3.5))
    assert found["perplexity"] == pytest.approx(math.exp(math.log(real) * (1 - share)), rel=1e-9)
    assert found["perplexity"] < real
    assert found["perplexity_if_padding_were_free"] == pytest.approx(found["perplexity"], rel=1e-9)


def test_batches_are_weighted_not_targets(split, tokenizer):
    targets = torch.tensor(naive_blocks(TEXTS, tokenizer))[:, 1:]
    found = report(losses(3.5, 0.0, 0.0), split, tokenizer)
    batch_means = [3.5 * float((batch != 0).double().mean()) for batch in targets.split(BATCH)]
    assert len({len(batch) for batch in targets.split(BATCH)}) > 1
    expected = math.exp(sum(batch_means) / len(batch_means))
    assert found["perplexity"] == pytest.approx(expected, rel=1e-9)
    by_target = math.exp(3.5 * float((targets != 0).double().mean()))
    assert abs(found["perplexity"] - by_target) > 1e-6


def test_cap_takes_the_first_blocks(split, tokenizer):
    assert report(losses(1.0, 1.0, 1.0), split, tokenizer, max_blocks=3)["blocks"] == 3


def test_real_model_is_scored(split, tokenizer, model):
    found = report(model, split, tokenizer, max_blocks=20)
    blocks = torch.tensor(naive_blocks(TEXTS, tokenizer)[:20])
    with torch.no_grad():
        nll = model(blocks[:, :-1], blocks[:, 1:]).token_nll_BT.double()
    assert found["perplexity"] == pytest.approx(math.exp(float(nll.mean())), rel=1e-5)


def test_short_paragraphs_give_no_figure(tokenizer, make_split):
    split = make_split([tokenizer.encode("a short line\n" * 50).ids])
    found = legacy_sra(losses(1.0, 1.0, 1.0), split, tokenizer, False, CPU)
    assert found.keys() == {"reason"}


def test_tokenizer_with_the_mark_elsewhere_gives_no_figure(split):
    other = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))
    assert legacy_sra(losses(1.0, 1.0, 1.0), split, other, False, CPU).keys() == {"reason"}
