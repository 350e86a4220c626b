"""One owner per knob between recipe and DeepSpeed JSON."""

import json

import pytest
import torch

from commands import RECIPE, ROOT
from sra_ds.config import load_recipe
from sra_ds.config.loading import validate
from sra_ds.errors import ConfigError
from sra_ds.training import environment
from sra_ds.training.ds_config import (
    choose_precision,
    merge_ds_config,
    plan_batches,
    read_ds_config,
)
from sra_ds.workflow.resolve import resolve


@pytest.fixture
def recipe():
    tree = json.loads(json.dumps(RECIPE))
    tree["data"]["train"] = ["text.jsonl"]
    return validate(tree)


def merged(recipe, ds_config, dtype=torch.float32):
    return merge_ds_config(ds_config, recipe, plan_batches(recipe, 1), dtype, "my.json")


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_configurations_own_no_knob_of_the_recipe(recipe, path):
    result = merged(recipe, read_ds_config(path))
    assert result["train_batch_size"] == recipe.training.batch_size
    assert result["gradient_clipping"] == recipe.training.gradient_clipping


def test_clipping_is_written_even_when_it_is_off(recipe):
    """DeepSpeed's own default is 1.0."""
    off = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"gradient_clipping": 0.0})}
    )
    assert merged(off, {})["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"train_batch_size": 64}, "training.batch_size"),
        ({"gradient_clipping": 5.0}, "training.gradient_clipping"),
        ({"bf16": {"enabled": True}}, "training.precision"),
        ({"optimizer": {"type": "Adam"}}, "training.optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "training.schedule"),
        ({"fp16": {"enabled": True}}, "training.precision"),
        ({"zero_optimizaton": {"stage": 2}}, "'zero_optimization'"),
        ({"elasticity": {}}, "leave it out"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "use cpu"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "use cpu"),
    ],
)
def test_a_contradiction_names_both_places(recipe, extra, named):
    with pytest.raises(ConfigError) as caught:
        merged(recipe, extra)
    assert "my.json" in str(caught.value) and named in str(caught.value)


@pytest.mark.parametrize(
    ("zero", "named"),
    [
        ({"stage": 2, "bukcet": 5}, "zero_optimization.bukcet"),
        ({"stage": 2, "reduce_bucket_size": -5}, "zero_optimization.reduce_bucket_size"),
        ({"stage": 2, "reduce_bucket_size": "big"}, "zero_optimization.reduce_bucket_size"),
        (
            {"stage": 3, "offload_param": {"device": "gpu"}},
            "zero_optimization.offload_param.device",
        ),
        ({"stage": 2, "offload_optimizer": "cpu"}, "zero_optimization.offload_optimizer"),
    ],
)
def test_what_deepspeed_will_not_take_is_named(recipe, zero, named):
    from sra_ds.training.engine import require_valid

    config = merged(recipe, {"zero_optimization": zero})
    with pytest.raises(ConfigError) as caught:
        require_valid(config, "my.json")
    assert "my.json" in str(caught.value) and named in str(caught.value)
    require_valid(
        merged(recipe, {"zero_optimization": {"stage": 2, "offload_optimizer": None}}), ""
    )


def test_auto_and_equal_values_are_no_contradiction(recipe):
    assert merged(recipe, {"train_batch_size": "auto", "gradient_clipping": 1.0})


def test_bf16_at_stage_0_is_refused_with_the_reason(recipe):
    with pytest.raises(ConfigError, match="master weights"):
        merged(recipe, {"zero_optimization": {"stage": 0}}, torch.bfloat16)
    assert merged(recipe, {"zero_optimization": {"stage": 1}}, torch.bfloat16)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize("asked", ["auto", "fp32", "bf16"])
def test_auto_precision_is_one_that_every_stage_takes(recipe, asked, has_bf16, stage):
    dtype, reason = choose_precision(asked, stage, has_bf16)
    narrow = asked == "bf16" or (asked == "auto" and has_bf16 and stage > 0)
    assert dtype == (torch.bfloat16 if narrow else torch.float32)
    assert ("stage 0" in reason) == (asked == "auto" and has_bf16 and stage == 0)
    if asked == "auto":
        assert merged(recipe, {"zero_optimization": {"stage": stage}}, dtype)


def test_shipped_recipes_start_at_stage_0_on_a_gpu_with_bf16(monkeypatch):
    monkeypatch.setattr(environment, "has_bf16", lambda device: True)
    for stage, dtype in ((0, torch.float32), (2, torch.bfloat16)):
        found = resolve(load_recipe("quickstart"), ROOT / "ds_configs" / f"zero{stage}.json")
        assert found.dtype == dtype


@pytest.mark.parametrize(("batch", "micro", "world"), [(9, 0, 2), (8, 3, 1), (8, 8, 2)])
def test_batches_that_do_not_divide_are_refused(recipe, batch, micro, world):
    training = recipe.training.model_copy(update={"batch_size": batch, "micro_batch_size": micro})
    with pytest.raises(ConfigError, match="not divisible"):
        plan_batches(recipe.model_copy(update={"training": training}), world)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON object"),
        ('{"zero_optimization": 2}', "stage must be"),
    ],
)
def test_a_bad_json_is_named(tmp_path, text, says):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_ds_config(path)
