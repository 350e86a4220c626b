"""Each wrong recipe gives one line: the dotted path, the value and what was allowed."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sra_ds.config import load_recipe, named_recipes
from sra_ds.errors import ConfigError

ROUTER_KEYS = "anchors, gate, initial_temperature, kind, noise, temperature"

BAD_OVERRIDES = {
    # unknown keys
    "modle.width=8": "unknown key modle (did you mean 'model'?)",
    "model.widht=8": "unknown key model.widht (did you mean 'width'?)",
    "model.mixer.haeds=8": "unknown key model.mixer.haeds (did you mean 'heads'?)",
    "model.channel.expert.hiden=8": (
        "unknown key model.channel.expert.hiden (did you mean 'hidden'?)"
    ),
    "model.channel.router.temprature=none": (
        "unknown key model.channel.router.temprature (did you mean 'temperature'?)"
    ),
    "model.channel.router.qqq=1": f"unknown key model.channel.router.qqq (known: {ROUTER_KEYS})",
    "losses.balance.weigth=1": "unknown key losses.balance.weigth (did you mean 'weight'?)",
    "data.tokenizer.vocab=300": "unknown key data.tokenizer.vocab (did you mean 'vocab_size'?)",
    "data.train=[x]": (
        "unknown key data.train (known: directory, packages, sequence_length, source, tokenizer)"
    ),
    # wrong types and ranges
    "model.width=wide": (
        "model.width: Input should be a valid integer, unable to parse string as an integer "
        "(got 'wide')"
    ),
    "model.width=[1]": "model.width: Input should be a valid integer (got [1])",
    "model=3": "model: Input should be a valid dictionary or instance of ModelConfig (got 3)",
    "name=5": "name: Input should be a valid string (got 5)",
    "training.steps=0": "training.steps: Input should be greater than 0 (got 0)",
    "training.steps=": "training.steps: Input should be a valid integer (got None)",
    "training.optimizer.learning_rate=.nan": (
        "training.optimizer.learning_rate: Input should be a finite number (got nan)"
    ),
    "losses.balance.weight=-1": (
        "losses.balance.weight: Input should be greater than or equal to 0 (got -1)"
    ),
    "logging.prompts=x": "logging.prompts: Input should be a valid tuple (got 'x')",
    "data.tokenizer.vocab_size=256": (
        "data.tokenizer.vocab_size: Input should be greater than or equal to 257 (got 256)"
    ),
    "schema_version=2": "schema_version: Input should be 1 (got 2)",
    "training.precision=fp16": (
        "training.precision: Input should be 'auto', 'fp32' or 'bf16' (got 'fp16')"
    ),
    # wrong kinds
    "model.channel.router.kind=coz": (
        "model.channel.router.kind: got 'coz', allowed: 'cosine', 'linear', 'random', 'hash'"
    ),
    "model.channel.router=coz": (
        "model.channel.router.kind: got 'coz', allowed: 'cosine', 'linear', 'random', 'hash'"
    ),
    "model.mixer=mamba": (
        "model.mixer.kind: got 'mamba', allowed: 'attention', 'resonance', 'convolution', 'wavelet'"
    ),
    "model.mixer={kind: wavelet, form: wave}": (
        "model.mixer.form: got 'wave', allowed: 'wave_conv', 'wave_attn'"
    ),
    "model.mixer={kind: wavelet, level: 2}": "unknown key model.mixer.level (did you mean 'levels'?)",
    "model.mixer={kind: wavelet, families: [dmey]}": (
        "recipe: model.mixer.levels=3 with families=['dmey'] sees 428 positions, more than "
        "data.sequence_length=32; take fewer levels or a shorter filter"
    ),
    "model.mixer={kind: wavelet, families: [db99]}": (
        "model.mixer.families.0: Input should be 'haar', 'db2', 'db3', 'db4', 'db6', 'db8', 'sym4', "
        "'sym6', 'sym8', 'coif1', 'coif2' or 'dmey' (got 'db99')"
    ),
    "model.embedding={kind: spectral, harmonics: 500}": (
        "model: embedding.harmonics=500: width=16 has room for at most 7 waves (width / 2 - 1)"
    ),
    "model.mixer={kind: wavelet, families: [db4, haar], filters: learnable}": (
        "model.mixer: filters=learnable needs one family: where several are drawn from, those not drawn "
        "would not learn"
    ),
    "model.mixer={kind: wavelet, choice_temperature: [2, 1]}": (
        "model.mixer: choice_temperature has no effect with one family"
    ),
    "model.mixer={kind: wavelet, heads: 6}": (
        "model.mixer: heads=6 must be a multiple of levels + 1 = 4: each band has as many"
    ),
    "losses.wavelet_weight=0.5": (
        "recipe: losses.wavelet_weight=0.5 has no effect without model.mixer.filters=learnable"
    ),
    "data.source=web": (
        "data.source: got 'web', allowed: 'docstrings', 'text', 'wikitext-103', 'wikitext-2', 'hub'"
    ),
    "training.optimizer=adam": ("training.optimizer.kind: got 'adam', allowed: 'adamw', 'sgd'"),
    "losses.dispersion.weight=1": "unknown key losses.dispersion.weight (known: kind)",
    # missing
    "data.source=text": "data.train is required",
    "model.channel.kind=dense": "model.channel.feed_forward is required",
    "losses.balance=bandpass": (
        "losses.balance.weight is required; losses.balance.low is required; "
        "losses.balance.high is required"
    ),
    # malformed overrides
    "training.steps": "override 'training.steps': expected key.path=value",
    "=1": "override '=1': expected key.path=value",
    "a..b=1": "override 'a..b=1': expected key.path=value",
    ".a=1": "override '.a=1': expected key.path=value",
    "a=[": "override 'a=[': the value is not valid YAML",
    # fields that contradict each other
    "model.channel.top_k=9": "model.channel: top_k=9 exceeds experts=8",
    "model.width=18": "model: width=18 must be a multiple of 2 x mixer.heads=4",
    "model.width=12": "model: width=12 must be a multiple of 8 for grouped products",
    "model.channel.expert.hidden=12": (
        "model: expert.hidden=12 must be a multiple of 8 for grouped products"
    ),
    "evaluation.stride=33": "recipe: evaluation.stride=33 exceeds data.sequence_length=32",
    "training.top_k_schedule=[[0, 1], [0.5, 1]]": (
        "recipe: training.top_k_schedule must stay within experts=8 and end at "
        "model.channel.top_k=2, got [1, 1]"
    ),
    "training.top_k_schedule=[[0, 9], [0.5, 2]]": (
        "recipe: training.top_k_schedule must stay within experts=8 and end at "
        "model.channel.top_k=2, got [9, 2]"
    ),
    "training.top_k_schedule=[[0, 1.5]]": (
        "training: top_k_schedule: k must be a whole number of at least 1"
    ),
    "training.top_k_schedule=[[0.1, 2]]": (
        "training: top_k_schedule: shares of the run must rise from 0 and stay below 1: [0.1]"
    ),
    "training.top_k_schedule=[[0, 1], [0, 2]]": (
        "training: top_k_schedule: shares of the run must rise from 0 and stay below 1: [0.0, 0.0]"
    ),
    "training.temperature_schedule=[[0, 1], [1, 2]]": (
        "training: temperature_schedule: shares of the run must rise from 0 and stay below 1: "
        "[0.0, 1.0]"
    ),
    "training.batching=documents": (
        "training: batching=documents needs micro_batch_size: times the sequence length it is the "
        "budget of tokens of a micro-batch"
    ),
    # parts of the Semantic Resonance LM
    "model.embedding={kind: prime_hilbert, primes: [7, 4]}": (
        "model.embedding.primes: 4 is not a prime (got [7, 4])"
    ),
    "model.embedding={kind: prime_hilbert, primes: []}": (
        "model.embedding.primes: needs one prime or more, each once (got [])"
    ),
    "model.embedding={kind: prime_hilbert, primes: [7, 7]}": (
        "model.embedding.primes: needs one prime or more, each once (got [7, 7])"
    ),
    "model.memory={kind: static, slots: 8}": "model.memory: best=32 exceeds slots=8",
    "model.mixer={kind: resonance, treshold: 0.5}": (
        "unknown key model.mixer.treshold (did you mean 'threshold'?)"
    ),
    "model.mixer={kind: resonance, threshold: 1.6}": (
        "model.mixer.threshold: Input should be less than or equal to 1 (got 1.6)"
    ),
    "model.head={kind: pre_manifest, candidates: 999999}": (
        "recipe: model.head.candidates=999999 exceeds data.tokenizer.vocab_size=300"
    ),
    "losses.ponder_weight=0.1": (
        "recipe: losses.ponder_weight=0.1 has no effect without model.mixer.kind=resonance with "
        "halting=soft and some iterations"
    ),
    "losses.memory_weight=0.1": (
        "recipe: losses.memory_weight=0.1 has no effect without model.memory.kind=static"
    ),
    "losses.supervision_weight=1": (
        "recipe: losses.supervision_weight=1 has no effect without model.head.deep_supervision=true"
    ),
}

DENSE = "model.channel={kind: dense, feed_forward: {kind: gelu, hidden: 8}}"
BAD_COMBINATIONS = {
    (DENSE, "training.top_k_schedule=[[0, 2]]"): (
        "recipe: training.top_k_schedule needs model.channel.kind=moe"
    ),
    (DENSE, "training.selection_bias_rate=0.1"): (
        "recipe: training.selection_bias_rate needs a router with scores"
    ),
    ("model.channel.router=linear", "training.temperature_schedule=[[0, 1]]"): (
        "recipe: training.temperature_schedule needs a cosine router with temperature=fixed"
    ),
    ("model.widht=8", "training.stepz=1"): (
        "unknown key model.widht (did you mean 'width'?); "
        "unknown key training.stepz (did you mean 'steps'?)"
    ),
}  # fmt: skip


def message_of(recipe: str, overrides: list[str]) -> str:
    """The text of the `ConfigError` that loading raises."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES.items(), ids=BAD_OVERRIDES.keys())
def test_bad_override_is_explained_in_one_line(tiny, override, message):
    assert message_of(tiny, [override]) == message
    assert "\n" not in message


@pytest.mark.parametrize(("overrides", "message"), BAD_COMBINATIONS.items())
def test_bad_combination_is_explained_in_one_line(tiny, overrides, message):
    assert message_of(tiny, list(overrides)) == message


@pytest.mark.parametrize("override", [o for o in BAD_OVERRIDES if "top_k=9" in o or "widht" in o])
def test_a_file_is_explained_like_an_override(tiny, write_recipe, override):
    path, _, value = override.partition("=")
    keys = path.split(".")
    body = "".join(f"{'  ' * depth}{key}:\n" for depth, key in enumerate(keys))[:-1] + f" {value}\n"
    child = write_recipe("child.yaml", f"extends: tiny.yaml\n{body}")
    assert message_of(child, []) == BAD_OVERRIDES[override]


def test_unknown_recipe_suggests_the_nearest():
    assert message_of("quikstart", []) == (
        "no recipe named 'quikstart' (did you mean 'quickstart'?); "
        f"known: {', '.join(named_recipes())}; or give a .yaml file"
    )


def test_missing_recipe_file_is_named(tmp_path):
    path = tmp_path / "absent.yaml"
    assert message_of(str(path), []) == f"recipe file {path} does not exist"


@pytest.mark.parametrize(
    ("text", "kind"), [("", "NoneType"), ("- a\n", "list"), ("just words", "str"), ("3", "int")]
)
def test_recipe_that_is_no_mapping_is_refused(write_recipe, text, kind):
    path = write_recipe("odd.yaml", text)
    assert message_of(path, []) == f"{path}: a recipe is a mapping of keys, found {kind}"


@pytest.mark.parametrize("text", ["a: [1\n", "a: b: c\n", "\tx: 1\n", "a: 'open\n", "\x00"])
def test_invalid_yaml_is_refused_in_one_line(write_recipe, text):
    path = write_recipe("broken.yaml", text)
    message = message_of(path, [])
    assert message.startswith(f"{path} is not valid YAML: ")
    assert "\n" not in message


def test_recipe_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    assert "\n" not in message_of(str(path), [])


def test_missing_parts_are_all_named(write_recipe):
    path = write_recipe("bare.yaml", "name: bare\n")
    assert message_of(path, []) == "data is required; model is required; training is required"


def test_choice_without_its_kind_is_refused(write_recipe):
    path = write_recipe("bare.yaml", "name: bare\ndata: {}\nlosses: {balance: {weight: 1}}\n")
    assert message_of(path, []) == (
        "data.source is required to say which choice the other keys belong to; model is required; "
        "losses.balance.kind is required to say which choice the other keys belong to; "
        "training is required"
    )


def test_recipe_that_extends_itself_is_refused(write_recipe):
    path = write_recipe("loop.yaml", "extends: loop.yaml\n")
    assert message_of(path, []) == f"recipe {path!r} extends itself: {path}"


def test_ring_of_recipes_is_refused(write_recipe):
    first = write_recipe("first.yaml", "extends: second.yaml\n")
    second = write_recipe("second.yaml", "extends: first.yaml\n")
    assert message_of(first, []) == f"recipe {first!r} extends itself: {first} -> {second}"


def test_ring_through_a_parent_folder_is_refused(write_recipe):
    path = write_recipe("folder/loop.yaml", "extends: ../folder/loop.yaml\n")
    assert "extends itself" in message_of(path, [])


def test_unknown_parent_is_named(write_recipe):
    path = write_recipe("child.yaml", "extends: quikstart\n")
    assert message_of(path, []).startswith(
        "no recipe named 'quikstart' (did you mean 'quickstart'?)"
    )
    path = write_recipe("child.yaml", "extends: absent.yaml\n")
    assert message_of(path, []) == "recipe file absent.yaml does not exist"


def test_folder_named_like_a_recipe_is_refused(tmp_path):
    path: Path = tmp_path / "folder.yaml"
    path.mkdir()
    assert message_of(str(path), []) == f"recipe file {path} does not exist"


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(SCALARS, inner, max_size=2)
)
PATHS = st.sampled_from(
    [o.partition("=")[0] for o in BAD_OVERRIDES if all(o.partition("=")[0].split("."))]
)


@given(path=PATHS, value=TREES)
@example(path="losses.balance", value={"two\nlines": None})
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_value_anywhere_loads_or_gives_one_line(tiny, path, value):
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    try:
        load_recipe(tiny, [f"{path}={text}"])
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
