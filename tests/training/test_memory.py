"""The memory estimate against peaks measured with `tools/bench.py memory`."""

import pytest
import torch

from sra_ds.config import load_recipe
from sra_ds.model.counting import count_parameters
from sra_ds.model.language_model import build_model
from sra_ds.training.ds_config import plan_batches
from sra_ds.training.memory import estimate_bytes

MEASURED = {0: 9_515_491_328 - 259_993_600, 2: 16_341_979_136 - 267_112_448}


@pytest.mark.parametrize("stage", MEASURED)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(stage):
    """sra-128e, one step of two windows on the CPU, resident memory before the model subtracted."""
    recipe = load_recipe("sra-128e", ["training.batch_size=2", "training.micro_batch_size=0"])
    parameters = count_parameters(build_model(recipe, "meta"))["total"]
    found = estimate_bytes(recipe, parameters, plan_batches(recipe, 1), stage, torch.float32)
    assert found["total"] == pytest.approx(MEASURED[stage], rel=0.15)
