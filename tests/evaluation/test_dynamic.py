"""Dynamic evaluation: what is written, when, and that nothing of it stays."""

import copy

import pytest
import torch

from sra_ds.data.loader import Batch
from sra_ds.errors import ConfigError
from sra_ds.evaluation.dynamic import evaluate_dynamically, writing
from sra_ds.evaluation.perplexity import evaluate
from sra_ds.evaluation.run import Scoring, setting
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import LoadedRun, load_run


@pytest.fixture
def loaded(make_run) -> LoadedRun:
    return load_run(make_run("resonance-moe").path)


def test_each_window_is_scored_by_what_was_written_before_it(loaded) -> None:
    model, end = loaded.model, 0
    ids_BT = torch.randint(1, 300, (3, 16))
    ids_BT[:, 0] = end
    batches = [Batch(row[None], row.roll(-1)[None], torch.zeros(1, 16)) for row in ids_BT]
    memories = model.persistent_memories()
    states = [memory.start_state_HCC.clone() for memory in memories]
    with torch.no_grad(), writing(model) as written:
        found = [written(*batch).loss_sum for batch in batches]
    assert all(torch.equal(m.start_state_HCC, s) for m, s in zip(memories, states, strict=True))
    by_hand = copy.deepcopy(model)
    for number, batch in enumerate(batches):
        with torch.no_grad():
            output = by_hand(*batch)
        assert torch.equal(output.loss_sum, found[number])
        for memory, state in zip(
            by_hand.persistent_memories(), output.memory_states_HCC, strict=True
        ):
            memory.start_state_HCC.lerp_(state, 0.1)


def test_it_differs_from_evaluation_which_it_leaves_alone(loaded) -> None:
    how = setting(loaded, Scoring(), torch.device("cpu"))
    with open_text(loaded) as text:
        before = evaluate(loaded.model, text.split, how)
        dynamic = evaluate_dynamically(loaded.model, text.split, how)
        again = evaluate_dynamically(loaded.model, text.split, how)
        after = evaluate(loaded.model, text.split, how)
    assert before.nll == after.nll and dynamic.nll == again.nll
    assert dynamic.nll != before.nll and dynamic.tokens == before.tokens


def test_the_tool_tells_the_two_apart(make_run, call, loaded) -> None:
    found = call("evaluate", "--run", loaded.run.path, "--dynamic", "--json").tree
    plain = call("evaluate", "--run", loaded.run.path, "--json").tree
    assert found["nll_per_token"] == plain["nll_per_token"]
    assert found["dynamic_evaluation"]["nll_per_token"] != plain["nll_per_token"]
    assert "dynamic_evaluation" not in plain


def test_a_model_without_such_memory_is_refused(make_run, call) -> None:
    loaded = load_run(make_run("dense").path)
    how = setting(loaded, Scoring(), torch.device("cpu"))
    with open_text(loaded) as text, pytest.raises(ConfigError, match=r"memory\.kind=persistent"):
        evaluate_dynamically(loaded.model, text.split, how)
    call("evaluate", "--run", loaded.run.path, "--dynamic").refused("memory.kind=persistent")
