"""Evaluation on connected processes gives the totals of one."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing

from sra_ds.evaluation.perplexity import Setting, evaluate


@pytest.mark.parametrize(
    ("world_size", "batch_size", "stride", "max_tokens"),
    [(2, 3, 5, 0), (2, 4, 16, 40)],
    ids=["ragged shares", "a rank with nothing to score"],
)
def test_totals_do_not_depend_on_the_number_of_processes(
    model, split, tmp_path, monkeypatch, world_size, batch_size, stride, max_tokens
):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from gloo_evaluation import score_rank

    setting = Setting(16, stride, batch_size, 0)
    alone = evaluate(model, split, setting, max_tokens)
    assert alone is not None
    arguments = (world_size, tmp_path, model, split, setting, max_tokens)
    multiprocessing.spawn(score_rank, arguments, nprocs=world_size)
    saved = [torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in range(world_size)]
    assert len({forwards for forwards, _ in saved}) == 1
    for _, values in saved:
        together = type(alone)(*values)
        assert together.nll == pytest.approx(alone.nll, rel=1e-9)
        assert together[1:6] == alone[1:6]
        np.testing.assert_allclose(together.document_nll, alone.document_nll, rtol=1e-9)
        np.testing.assert_array_equal(together.document_tokens, alone.document_tokens)
        np.testing.assert_array_equal(together.load_LE, alone.load_LE)
