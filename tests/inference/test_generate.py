"""A prompt's continuation is that of the full forward pass, alone and beside others."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sra_ds.data.tokenizer import end_of_text_id
from sra_ds.inference.generate import (
    Sampling,
    distribution,
    draw,
    generate,
    generate_batch,
    left_padded,
    next_tokens,
)
from sra_ds.inference.load import LoadedRun, load_run
from sra_ds.storage.run_dir import RunDir

GREEDY = Sampling(temperature=0)
PROMPTS = ["abc de", "", "j", "abcdefghij fgh a b c", "\U0001f642 naïve"]
NEW = 12


@pytest.fixture
def loaded(make_run: Callable[..., RunDir], family: str) -> LoadedRun:
    """Each kind of model in turn, with logits far apart."""
    return load_run(make_run(family).path)


def opened(loaded: LoadedRun, prompt: str) -> list[int]:
    return [end_of_text_id(loaded.tokenizer), *loaded.tokenizer.encode(prompt).ids]


@torch.no_grad()
def greedy_without_cache(loaded: LoadedRun, prompt: str, tokens: int) -> list[int]:
    """New ids by whole forward passes over ever longer texts."""
    ids = opened(loaded, prompt)
    first, entries = len(ids), loaded.tokenizer.get_vocab_size()
    for _ in range(tokens):
        logits_V = loaded.model(torch.tensor([ids])).logits[0, -1, :entries]
        ids.append(int(logits_V.argmax()))
        if ids[-1] == ids[0]:
            break
    return ids[first:]


def rows_of(loaded: LoadedRun, prompts: list[str], sampling: Sampling) -> list[list[int]]:
    steps = list(next_tokens(loaded.model, loaded.tokenizer, prompts, NEW, sampling))
    end = end_of_text_id(loaded.tokenizer)
    rows = [list(row) for row in zip(*steps, strict=True)]
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def test_greedy_decoding_is_that_of_the_full_forward_pass(loaded: LoadedRun) -> None:
    rows = rows_of(loaded, PROMPTS, GREEDY)
    assert rows == [greedy_without_cache(loaded, prompt, NEW) for prompt in PROMPTS]
    assert len({tuple(row) for row in rows}) > 1


@torch.no_grad()
def test_logits_beside_others_are_those_alone(loaded: LoadedRun) -> None:
    ids_BT, valid_BT = left_padded([opened(loaded, prompt) for prompt in PROMPTS], 0)
    more_BT = torch.randint(1, 250, (len(PROMPTS), 5))
    state = loaded.model.new_state()
    parts = [loaded.model(ids_BT, valid_BT=valid_BT, state=state).logits]
    parts += [loaded.model(more_BT[:, t : t + 1], state=state).logits for t in range(5)]
    together_BTV = torch.cat(parts, 1)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.cat([torch.tensor(opened(loaded, prompt)), more_BT[row]])
        alone_TV = loaded.model(ids[None]).logits[0]
        difference, largest = (
            (together_BTV[row, -len(ids) :] - alone_TV).abs().max(),
            alone_TV.abs().max(),
        )
        assert difference <= 5e-6 * largest and largest > 0.5


def test_sampling_beside_others_is_that_alone(loaded: LoadedRun) -> None:
    for sampling in (Sampling(seed=3), Sampling(1.5, 20, 1.0, 4, 1.3)):
        together = rows_of(loaded, PROMPTS, sampling)
        assert together == [rows_of(loaded, [prompt], sampling)[0] for prompt in PROMPTS]
        backwards = rows_of(loaded, PROMPTS[::-1], sampling)
        assert together == backwards[::-1]
    assert together != rows_of(loaded, PROMPTS, sampling._replace(seed=5))


@pytest.fixture
def plain(make_run: Callable[..., RunDir]) -> LoadedRun:
    return load_run(make_run().path)


def test_the_stream_and_the_batch_tell_the_same_text(plain: LoadedRun) -> None:
    """Also where a token is a part of a character, and where the last bytes are no character."""
    for seed in range(2):
        sampling = Sampling(temperature=3.0, seed=seed)
        found = generate_batch(plain.model, plain.tokenizer, PROMPTS, 40, sampling)
        for prompt, continuation in zip(PROMPTS, found, strict=True):
            pieces = list(generate(plain.model, plain.tokenizer, prompt, 40, sampling))
            assert "".join(pieces) == continuation.text and continuation.prompt == prompt
            assert len(pieces) <= continuation.tokens and all(pieces)
            assert continuation.ended == (continuation.tokens < 40)


def test_a_text_ends_where_the_model_ends_it(plain: LoadedRun) -> None:
    end = end_of_text_id(plain.tokenizer)
    with torch.no_grad():
        plain.model.embedding.weight[end] = 0
        plain.model.final_norm.bias.zero_()
        plain.model.final_norm.weight.zero_()  # all logits 0: the first id is the most likely
    assert end == 0
    (found,) = generate_batch(plain.model, plain.tokenizer, ["abc"], 5, GREEDY)
    assert (found.text, found.tokens, found.ended) == ("", 0, True)
    assert list(generate(plain.model, plain.tokenizer, "abc", 5, GREEDY)) == []


def test_decoding_goes_on_beyond_the_trained_length(plain: LoadedRun) -> None:
    assert plain.recipe.data.sequence_length == 16
    (found,) = generate_batch(plain.model, plain.tokenizer, ["abc"], 40, GREEDY)
    steps = next_tokens(plain.model, plain.tokenizer, ["abc"], 40, GREEDY)
    assert found.tokens == 40 and [token for (token,) in steps] == greedy_without_cache(
        plain, "abc", 40
    )


# the distribution, on logits whose probabilities are 0.5, 0.25, 0.125, 0.125

LOGITS_BV = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
NOTHING_SEEN = torch.zeros(1, 4, dtype=torch.bool)
ALL = Sampling(temperature=1.0, top_p=1.0)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (ALL, [0.25, 0.5, 0.125, 0.125]),
        (ALL._replace(temperature=0.5), [2 / 11, 8 / 11, 0.5 / 11, 0.5 / 11]),
        (ALL._replace(temperature=0), [0, 1, 0, 0]),
        (ALL._replace(temperature=1e-40), [0, 1, 0, 0]),
        (ALL._replace(temperature=math.inf), [0.25, 0.25, 0.25, 0.25]),
        (ALL._replace(top_k=1), [0, 1, 0, 0]),
        (ALL._replace(top_k=3), [2 / 7, 4 / 7, 1 / 7, 0]),
        (ALL._replace(top_k=99), [0.25, 0.5, 0.125, 0.125]),
        (ALL._replace(top_p=0.01), [0, 1, 0, 0]),
        (ALL._replace(top_p=0.6), [1 / 3, 2 / 3, 0, 0]),
        (ALL._replace(top_p=0.8), [2 / 7, 4 / 7, 1 / 7, 0]),
        (ALL._replace(top_p=0.8, top_k=2), [1 / 3, 2 / 3, 0, 0]),
    ],
    ids=str,
)
def test_the_distribution_is_the_one_by_hand(sampling: Sampling, expected: list[float]) -> None:
    found_BV = distribution(LOGITS_BV, NOTHING_SEEN, sampling)
    torch.testing.assert_close(found_BV, torch.tensor([expected]).double(), rtol=1e-6, atol=1e-7)


def test_repetition_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits_BV = torch.tensor([[2.0, -1.0, 3.0, 0.5]])
    seen_BV = torch.tensor([[True, True, False, False]])
    expected = torch.tensor([[1.0, -2.0, 3.0, 0.5]]).double().softmax(-1)
    found = distribution(logits_BV, seen_BV, ALL._replace(repetition_penalty=2.0))
    torch.testing.assert_close(found, expected)
    assert torch.equal(
        distribution(logits_BV, seen_BV, ALL), distribution(logits_BV, ~seen_BV, ALL)
    )


def test_penalised_are_the_tokens_of_prompt_and_text_but_not_the_mark(plain: LoadedRun) -> None:
    """With a huge penalty no token comes twice, and the end of the document stays possible."""
    sampling = Sampling(temperature=0, repetition_penalty=1e6)
    (row,) = zip(*next_tokens(plain.model, plain.tokenizer, ["abc de"], 30, sampling), strict=True)
    prompt = plain.tokenizer.encode("abc de").ids
    positive = [token for token in row if token != end_of_text_id(plain.tokenizer)]
    assert len(set(positive)) == len(positive) and not set(positive) & set(prompt)


@torch.no_grad()
def test_the_mark_that_opened_the_document_is_no_repetition(plain: LoadedRun) -> None:
    """The end is a little likelier than one other token, whatever came before."""
    logits_V = torch.zeros(plain.model.vocab_size)
    logits_V[end_of_text_id(plain.tokenizer)], logits_V[7] = 1.0, 0.9
    plain.model.embedding.weight[:, 0] = logits_V
    plain.model.final_norm.weight.zero_()
    plain.model.final_norm.bias.copy_(torch.eye(32)[0])  # every position gives these logits
    for penalty in (1.0, 1.5):
        sampling = Sampling(temperature=0, repetition_penalty=penalty)
        (found,) = generate_batch(plain.model, plain.tokenizer, ["abc"], 5, sampling)
        assert found.ended and found.tokens == 0


def test_draws_fall_into_the_stretches_of_the_probabilities() -> None:
    probs_BV = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).double().expand(6, -1)
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    uniform_B = torch.tensor([0.0, 0.2, 0.4999, 0.5, 0.9, float(largest)])
    assert draw(probs_BV, uniform_B).tolist() == [1, 1, 1, 3, 3, 3]
    one_hot_BV = torch.eye(5).double()
    assert draw(one_hot_BV, torch.rand(5)).tolist() == [0, 1, 2, 3, 4]


def test_draws_follow_the_distribution() -> None:
    probs_BV = distribution(LOGITS_BV, NOTHING_SEEN, ALL).expand(20_000, -1)
    counts_V = draw(probs_BV, torch.rand(20_000)).bincount(minlength=4)
    torch.testing.assert_close(
        counts_V / 20_000, torch.tensor([0.25, 0.5, 0.125, 0.125]), rtol=0, atol=0.015
    )


def test_padding_is_on_the_left() -> None:
    ids_BT, valid_BT = left_padded([[5], [6, 7, 8]], 0)
    assert ids_BT.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert valid_BT.tolist() == [[False, False, True], [True, True, True]]


# the command


def test_the_command_tells_every_text(
    call: Callable[..., Any], make_run: Callable[..., RunDir], tmp_path: Path
) -> None:
    run = make_run()
    (tmp_path / "prompts.txt").write_text("abc\u2028de\r\n\nj\n", "utf-8")
    asked = ("generate", "--run", run.path, "--max-tokens", 5, "--seed", 1)
    several = (*asked, "--prompt", "xyz", "--prompts", tmp_path / "prompts.txt", "--batch-size", 2)
    tree = call(*several, "--json").tree
    assert [text["prompt"] for text in tree["texts"]] == ["xyz", "abc\u2028de", "j"]
    assert tree["sampling"]["seed"] == 1
    shown = call(*several)
    assert shown.out == "".join(f"{text['prompt']}{text['text']}\n\n" for text in tree["texts"])
    for text in tree["texts"]:
        alone = call(*asked, "--prompt", text["prompt"], "--json").tree
        assert {**text, "sampling": tree["sampling"]} == alone
        streamed = call(*asked, "--prompt", text["prompt"]).out
        assert streamed == f"{text['prompt']}{text['text']}\n"


def test_wrong_prompts_are_one_line(
    call: Callable[..., Any], make_run: Callable[..., RunDir], tmp_path: Path
) -> None:
    asked = ("generate", "--run", make_run().path)
    empty, noise = tmp_path / "empty.txt", tmp_path / "noise.txt"
    empty.write_text("\n\n")
    noise.write_bytes(b"\xff\xfe")
    call(*asked).refused("no prompt", "--prompt TEXT")
    call(*asked, "--prompts", empty).refused("no prompt")
    call(*asked, "--prompts", noise).refused(str(noise), "UTF-8")
    call(*asked, "--prompts", tmp_path / "none.txt").refused("none.txt", "No such file")
    call(*asked, "--prompt", "\udcff").refused("UTF-8")
    result = call(*asked, "--prompt", "a", "--repetition-penalty", "0")
    assert result.code == 2 and "must be at least" in result.err
