"""defaults < extended recipe < recipe < overrides; a dump reads back to the same recipe."""

import subprocess
import sys

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sra_ds.config import Recipe, dump_recipe, load_recipe, named_recipes
from sra_ds.config.data import DocstringsConfig, TextConfig
from sra_ds.config.loading import merge, parse_override, validate
from sra_ds.config.losses import NoTerm, SquaredDispersionConfig
from sra_ds.config.model import (
    AttentionConfig,
    DenseChannelConfig,
    GeluConfig,
    LinearRouterConfig,
    SwigluConfig,
)
from sra_ds.config.training import AdamWConfig, ScheduleConfig, SgdConfig

VARIANTS = [
    [],
    ["losses.dispersion={kind: log_mean_exp, weight: 1.0e-7}", "losses.z_weight=1e-4"],
    [
        "model.channel={kind: dense, feed_forward: {kind: swiglu, hidden: 24}}",
        "losses.balance=none",
    ],
    ["model.channel.shared_expert={kind: gelu, hidden: 8}", "model.channel.router=hash"],
    ["data={source: text, train: [a.txt, b/c], valid: [v.jsonl], tokenizer: {file: t.json}}"],
    ["data={source: wikitext-2, path: /x, raw: false}", "evaluation.stride=16"],
    ["data={source: hub, dataset: a/b}", "training.optimizer=sgd"],
    ["training.top_k_schedule=[[0, 1], [0.25, 2]]", "training.temperature_schedule=[[0, 3.5]]"],
    ["training.optimizer.learning_rate=3.3333333333333335e-05", "training.seed=123456789"],
]


@pytest.mark.parametrize("overrides", VARIANTS)
def test_dump_reads_back_equal(tiny, write_recipe, overrides):
    recipe = load_recipe(tiny, overrides)
    assert load_recipe(write_recipe("again.yaml", dump_recipe(recipe))) == recipe


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\x85")
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_survives_the_dump(tiny, write_recipe, text):
    recipe = load_recipe(tiny).model_copy(update={"description": text})
    assert load_recipe(write_recipe("again.yaml", dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("name", named_recipes())
def test_shipped_recipe_loads_under_its_own_name(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert validate(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_there_are_shipped_recipes():
    assert {"quickstart", "quickstart-dense"} <= set(named_recipes())


def test_child_changes_only_what_it_names(tiny, write_recipe):
    child = write_recipe("child.yaml", "extends: tiny.yaml\nname: child\ntraining: {steps: 7}\n")
    parent = load_recipe(tiny)
    training = parent.training.model_copy(update={"steps": 7})
    assert load_recipe(child) == parent.model_copy(update={"name": "child", "training": training})


def test_layers_stack_and_the_nearest_wins(tiny, write_recipe):
    write_recipe("middle.yaml", "extends: tiny.yaml\ntraining: {steps: 7, seed: 3}\n")
    top = write_recipe("top.yaml", "extends: middle.yaml\ntraining: {seed: 4}\n")
    training = load_recipe(top, ["training.batch_size=2"]).training
    assert (training.steps, training.seed, training.batch_size) == (7, 4, 2)


def test_file_may_extend_a_shipped_recipe(write_recipe):
    child = write_recipe("child.yaml", "extends: quickstart\nname: child\n")
    assert load_recipe(child) == load_recipe("quickstart").model_copy(update={"name": "child"})


def test_parent_is_looked_up_beside_its_child(write_recipe, tiny):
    child = write_recipe("folder/child.yaml", "extends: ../tiny.yaml\n")
    assert load_recipe(child) == load_recipe(tiny)


def test_child_that_changes_kind_drops_the_parents_keys(tiny, write_recipe):
    child = write_recipe(
        "child.yaml",
        "extends: tiny.yaml\nlosses: {balance: none}\n"
        "model: {channel: {kind: dense, feed_forward: {kind: gelu, hidden: 4}}}\n",
    )
    recipe = load_recipe(child)
    assert recipe.model.channel == DenseChannelConfig(feed_forward=GeluConfig(hidden=4))
    assert recipe.losses.balance == NoTerm()
    assert recipe.model.width == 16


def test_child_reaches_into_a_part_its_parent_named_by_kind_alone(write_recipe, tiny):
    write_recipe("parent.yaml", "extends: tiny.yaml\nmodel: {channel: {router: linear}}\n")
    child = write_recipe(
        "child.yaml", "extends: parent.yaml\nmodel: {channel: {router: {bias: true}}}\n"
    )
    assert load_recipe(child).model.channel.router == LinearRouterConfig(bias=True)


def test_child_keeps_the_kind_its_parent_named_by_name_alone(write_recipe, tiny):
    write_recipe("parent.yaml", "extends: tiny.yaml\ntraining: {optimizer: sgd}\n")
    child = write_recipe(
        "child.yaml", "extends: parent.yaml\ntraining: {optimizer: {learning_rate: 0.5}}\n"
    )
    assert load_recipe(child).training.optimizer == SgdConfig(learning_rate=0.5)


def test_child_replaces_a_part_whose_usual_kind_its_parent_left_out(write_recipe, tiny):
    write_recipe("parent.yaml", "extends: tiny.yaml\ntraining: {optimizer: {betas: [0.9, 0.99]}}\n")
    child = write_recipe("child.yaml", "extends: parent.yaml\ntraining: {optimizer: {kind: sgd}}\n")
    assert load_recipe(child).training.optimizer == SgdConfig()


def test_usual_kind_may_be_left_out(tiny):
    overrides = ["model.channel.shared_expert={hidden: 8}", "training.optimizer.eps=1e-6"]
    recipe = load_recipe(tiny, overrides)
    assert recipe.model.channel.shared_expert == GeluConfig(hidden=8)
    assert recipe.training.optimizer == AdamWConfig(eps=1e-6)


def test_overrides_reach_defaults_the_recipe_left_out(tiny):
    recipe = load_recipe(tiny, ["training.optimizer.weight_decay=0", "logging.every=3"])
    assert recipe.training.optimizer == AdamWConfig(weight_decay=0)
    assert recipe.logging.every == 3
    assert recipe.logging.prompts == load_recipe(tiny).logging.prompts


def test_override_completes_an_incomplete_recipe(write_recipe, tiny):
    broken = write_recipe("broken.yaml", "extends: tiny.yaml\ntraining: {steps: null}\n")
    assert load_recipe(broken, ["training.steps=3"]).training.steps == 3


def test_override_completes_a_part_named_by_kind_alone(write_recipe, tiny):
    named = write_recipe("named.yaml", "extends: tiny.yaml\nlosses: {dispersion: squared}\n")
    recipe = load_recipe(named, ["losses.dispersion.weight=0.5"])
    assert recipe.losses.dispersion == SquaredDispersionConfig(weight=0.5)


@pytest.mark.parametrize("value", ["sgd", "{kind: sgd}"])
def test_override_that_changes_kind_replaces_the_part(tiny, write_recipe, value):
    child = write_recipe(
        "child.yaml", "extends: tiny.yaml\ntraining: {optimizer: {kind: adamw, learning_rate: 5}}\n"
    )
    recipe = load_recipe(child, [f"training.optimizer={value}"])
    assert recipe.training.optimizer == SgdConfig()


def test_keys_beside_a_new_kind_go_to_the_new_part(tiny):
    overrides = ["model.channel.expert.kind=swiglu", "model.channel.expert.hidden=8"]
    for order in (overrides, overrides[::-1]):
        assert load_recipe(tiny, order).model.channel.expert == SwigluConfig(hidden=8)


def test_naming_the_kind_a_part_has_already_keeps_its_keys(tiny):
    recipe = load_recipe(tiny, ["model.mixer=attention", "model.channel.router.kind=cosine"])
    assert recipe == load_recipe(tiny)


def test_override_of_source_keeps_what_all_corpora_share(tiny):
    overrides = ["data.train=[a.txt]", "data.source=text"]
    recipe, before = load_recipe(tiny, overrides), load_recipe(tiny).data
    assert recipe.data == TextConfig(
        train=("a.txt",),
        tokenizer=before.tokenizer,
        sequence_length=before.sequence_length,
        directory=before.directory,
    )


def test_later_override_wins(tiny):
    assert load_recipe(tiny, ["training.steps=5", "training.steps=6"]).training.steps == 6


def test_bare_names_stand_for_parts_with_their_defaults(tiny):
    recipe = load_recipe(
        tiny, ["data=docstrings", "model.mixer=attention", "training.schedule=wsd"]
    )
    assert recipe.data == load_recipe(tiny).data
    assert recipe.training.schedule == ScheduleConfig(kind="wsd")
    fresh = validate(_tree("mixer: attention"))
    assert fresh.model.mixer == AttentionConfig()
    assert fresh.data == DocstringsConfig()


def _tree(mixer: str) -> dict:
    return yaml.safe_load(
        f"""
        name: x
        data: docstrings
        model: {{{mixer}, channel: {{kind: dense, feed_forward: {{kind: gelu, hidden: 8}}}}}}
        training: {{steps: 1, batch_size: 1}}
        """
    )


def test_deliberate_zero_stays_zero(tiny):
    overrides = ["training.gradient_clipping=0", "model.mixer.dropout=0", "evaluation.every=0"]
    recipe = load_recipe(tiny, overrides)
    assert recipe.training.gradient_clipping == 0
    assert recipe.model.mixer.dropout == 0
    assert recipe.model.embedding.dropout == 0.1


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a.b=1", {"a": {"b": 1}}),
        ("a=", {"a": None}),
        ("a=x=y", {"a": "x=y"}),
        ("a.b=[1, {c: 2}]", {"a": {"b": [1, {"c": 2}]}}),
        ("a=false", {"a": False}),
    ],
)
def test_override_value_is_yaml(text, tree):
    assert parse_override(text) == tree


def test_merge_changes_neither_argument():
    base, overlay = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(base, overlay) == {"a": {"b": 1, "c": 2}}
    assert (base, overlay) == ({"a": {"b": 1}}, {"a": {"c": 2}})


def test_recipe_is_frozen(tiny):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(tiny).name = "other"


def test_every_field_of_the_recipe_that_is_a_part_has_a_docstring():
    for name, field in Recipe.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and hasattr(part, "model_fields"):
            assert part.__doc__, name


def test_config_imports_no_torch():
    code = "import sys, sra_ds.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
