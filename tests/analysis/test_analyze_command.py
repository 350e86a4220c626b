"""tools/analyze.py on tiny runs: what it writes, prints, reads again and refuses."""

import csv
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saved_runs import Call, MakeRun
from sra_ds.analysis import traces
from sra_ds.evaluation.compare.finished import cell_of_run

LAYERS, EXPERTS, STEP = 2, 4, 7
QUICK = ("--sweep-tokens", 0, "--tokens", 2000)


def strict_json(text: str) -> Any:
    """JSON by the standard, which has no NaN and no infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_standard_output_is_one_json_object_and_names_the_files(analysed: Any) -> None:
    assert analysed.result.returncode == 0, analysed.result.stderr
    printed = strict_json(analysed.result.stdout)
    out = analysed.out
    assert printed["report"] == str(out / "report.html")
    assert printed["experts"] == str(out / "experts.csv")
    assert printed["analysis"] == str(out / "analysis.json")
    for path in map(Path, printed["figures"]):
        assert path.parent == out / "figures" and "<svg" in path.read_text("utf-8")
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {path.stem for path in map(Path, printed["figures"])} == {
        "measures", "coherence", "load", "syntax", "co_activation", "anchor_cosines", "anchor_map",
        "sweeps",
    }  # fmt: skip
    assert [one["run"] for one in printed["summary"]] == ["moe-cosine", "moe-linear"]
    for summary in printed["summary"]:
        assert sum(summary["kinds"].values()) == LAYERS * EXPERTS


def test_the_table_has_one_row_per_expert(analysed: Any) -> None:
    """Loads and choices are those of analysis.json, and add up."""
    rows = rows_of(analysed.out / "experts.csv")
    whole = strict_json((analysed.out / "analysis.json").read_text())
    places = [(row["run"], int(row["layer"]), int(row["expert"])) for row in rows]
    expected = [
        (run.name, la, ex) for run in analysed.runs for la in range(LAYERS) for ex in range(EXPERTS)
    ]
    assert places == expected
    experts = [*whole["experts"], *whole["against"][0]["experts"]]
    for row, expert in zip(rows, experts, strict=True):
        assert float(row["load"]) == expert["load"] and row["kind"] == expert["kind"]
        assert row["top_words"] == " ".join(expert["top_words"])
        assert row["coherence_p"] == ("" if (p := expert["coherence"]["p"]) is None else str(p))
    for layer in range(LAYERS):
        loads = [e["load"] for e in whole["experts"] if e["layer"] == layer]
        assert math.isclose(sum(loads), 1)


def test_every_value_is_beside_chance_null_and_twin(analysed: Any) -> None:
    whole = strict_json((analysed.out / "analysis.json").read_text())
    assert whole["run"] == "moe-cosine" and whole["text"] == "page.md"
    assert [one["run"] for one in whole["against"]] == ["moe-linear"]
    assert [row["k"] for row in whole["sweeps"]["k"]] == [1, 2, 3, 4]
    for layer in whole["layers"]:
        for name in ("token_information", "vocabulary_specialisation", "co_activation"):
            one = layer["measures"][name]
            assert one["value"] is not None and one["untrained"] is not None, name
            assert 0 < one["p"] <= one["p_adjusted"] <= 1, name
            assert one["null_mean"] <= one["null_95"] + 1e-12, name
        assert layer["anchors"]["effective_rank"]["value"] <= EXPERTS + 1e-6


def test_a_second_call_reads_the_trace_again(
    call: Call, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the same text and length; what it finds is the same, and people are told where."""
    run = make_run()
    first = call("analyze", "--run", run.path, *QUICK, "--json").tree
    found = Path(first["analysis"]).read_text()
    monkeypatch.setattr(traces, "_Writer", None)
    again = call("analyze", "--run", run.path, *QUICK)
    assert again.code == 0, again.err
    assert Path(first["analysis"]).read_text() == found
    assert again.out.startswith("run: ") and f"open {run.path / 'report.html'}" in again.out
    assert len(list(run.routing.glob("trace-*"))) == 1


def test_a_comparison_tells_what_was_found_in_the_checkpoint_it_is_of(
    call: Call, make_run: MakeRun
) -> None:
    run = make_run()
    printed = call("analyze", "--run", run.path, *QUICK, "--json").tree["summary"][0]
    figures = ("token_perplexity", "word_perplexity", "bits_per_byte", "accuracy", "nll_per_token")
    summary = {
        "steps": STEP, "validation": dict.fromkeys(figures, 2.0), "experts": None, "tokens": 8,
        "seconds": 1.0, "tokens_per_second": 8.0, "device": "cpu", "corpus_fingerprint": "f",
    }  # fmt: skip
    run.summary_file.write_text(json.dumps(summary))
    run.environment_file.write_text(json.dumps({**run.environment(), "world_size": 1}))
    np.savez(run.evaluation / "valid_documents.npz", nll=[1.0], tokens=[2])
    found = cell_of_run(run.path).coherence
    assert found is not None and printed["coherent"] is not None
    assert (found.share, found.untrained) == (printed["coherent"], printed["coherent_untrained"])
    assert found.tokens == 2000
    run.summary_file.write_text(json.dumps({**summary, "steps": STEP + 1}))
    assert cell_of_run(run.path).coherence is None


def test_a_router_without_anchors_and_one_choice_is_analysed(call: Call, make_run: MakeRun) -> None:
    run = make_run("moe-hash", {"model": {"channel": {"top_k": 1}}})
    result = call("analyze", "--run", run.path, "--tokens", 2000, "--json").tree
    names = {Path(path).stem for path in result["figures"]}
    assert "anchor_map" not in names and "co_activation" not in names and "load" in names
    whole = strict_json((run.path / "analysis.json").read_text())
    assert set(whole["sweeps"]) == {"k"}, "tokens of a hash cannot go to other experts"
    assert not any(expert["nearest_tokens"] for expert in whole["experts"])
    for layer in whole["layers"]:
        assert layer["measures"]["vocabulary_specialisation"]["value"] == 1.0
        assert layer["measures"]["token_information"]["untrained"] == pytest.approx(
            layer["measures"]["token_information"]["value"]
        )  # a hash has nothing to train
        assert "co_activation" not in layer["measures"]


@pytest.mark.parametrize("tokens", [2, 17])
def test_a_text_too_short_for_anything_has_no_values_and_no_nan(
    tokens: int, call: Call, make_run: MakeRun
) -> None:
    run = make_run()
    result = call("analyze", "--run", run.path, "--sweep-tokens", 0, "--tokens", tokens, "--json")
    assert result.code == 0, result.err
    assert strict_json(result.out)["summary"][0]["coherent"] is None
    whole = strict_json((run.path / "analysis.json").read_text())
    assert whole["tokens"] == tokens
    assert "nan" not in (run.path / "report.html").read_text().split("<h2>Figures")[0]


def test_what_cannot_be_analysed_is_refused_in_one_line(
    call: Call, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    call("analyze", "--run", make_run("dense", name="dense").path).refused("no routed layers")
    beside = call("analyze", "--run", run.path, *QUICK, "--against", tmp_path / "dense")
    assert beside.code == 2 and "no routed layers" in beside.err.splitlines()[-1]
    call("analyze", "--run", tmp_path).refused(str(tmp_path), "not a run directory")
    call("analyze", "--run", run.path, "--checkpoint", 99).refused("99")
    call("analyze", "--run", run.path, "--text", tmp_path / "none.txt").refused("none.txt")
    (tmp_path / "odd.docx").write_text("x")
    call("analyze", "--run", run.path, "--text", tmp_path / "odd.docx").refused("unknown format")
    (tmp_path / "empty.txt").write_text("")
    call("analyze", "--run", run.path, "--text", tmp_path / "empty.txt").refused("has no text")
    assert not (run.path / "report.html").exists()


def test_a_map_by_umap_is_refused_where_that_is_missing(
    call: Call, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the work, and with what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    call("analyze", "--run", make_run().path, "--map", "umap").refused("umap-learn", "pip install")
