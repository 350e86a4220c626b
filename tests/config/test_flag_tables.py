"""The tables of the docs that lead from the original programs' flags to our keys."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sra_ds.config import load_recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"


def flags(page: str) -> list[tuple[str, str]]:
    text = (DOCS / page).read_text("utf-8")
    rows = re.findall(r"^\| `([^`|]+)` \| `([^`|]+)` \|", text, re.MULTILINE)
    assert len(rows) >= 10
    return rows


@pytest.mark.parametrize(
    "flag, ours", flags("moe-family.md"), ids=lambda value: value.split("=")[0]
)
def test_every_flag_of_the_moe_family_leads_to_a_key(flag: str, ours: str) -> None:
    if ours.startswith("--"):
        assert ours.split()[0] in ("--run", "--resume")
        return
    recipe, shipped = load_recipe("ghost-moe", [ours]), load_recipe("ghost-moe")
    if flag.startswith("architecture_mode"):
        assert recipe.model == shipped.model
        return
    assert recipe != shipped
    assert_set(recipe.model_dump(), ours, flag.split("=")[1])


@pytest.mark.parametrize("flag, ours", flags("spectral.md"), ids=lambda value: value.split("=")[0])
def test_every_flag_of_spectral_llm_leads_to_a_key(flag: str, ours: str) -> None:
    own = ["data.tokenizer.vocab_size=4000"]
    recipe, shipped = (
        load_recipe("quickstart-dense", overrides) for overrides in ([*own, ours], own)
    )
    assert recipe != shipped
    value = flag.partition("=")[2]
    if value and "{" in ours:
        (given,) = (part for part in yaml.safe_load(ours.partition("=")[2]).values()
                    if part in (yaml.safe_load(value), [value]))  # fmt: skip
        assert given
    elif value:
        assert_set(recipe.model_dump(), ours, value)


@pytest.mark.parametrize("flag, ours", flags("resonance.md"), ids=lambda value: value.split("=")[0])
def test_every_setting_of_the_resonance_sketch_leads_to_a_key(flag: str, ours: str) -> None:
    own = ["model.memory=static", "model.width=768"]
    found: Any = load_recipe("resonance-8m", [*own, ours]).model_dump(mode="json")
    key, given = ours.split("=")
    for part in key.split("."):
        found = found[part]
    flag, _, value = flag.partition("=")
    if flag in ("max_iterations", "entropy_threshold"):  # of another scale there
        assert str(found) == given != value
    elif flag not in ("use_prime_mask", "enable_hcw"):
        assert given == value
        expected = yaml.safe_load(value)
        assert found == (expected if isinstance(expected, list) else float(expected))


@pytest.mark.parametrize("flag, ours", flags("sra.md"), ids=lambda value: value.split("=")[0])
def test_every_setting_of_the_published_code_leads_to_a_key(flag: str, ours: str) -> None:
    own = ["losses.dispersion=none", "training.top_k_schedule=[]"]
    recipe, shipped = (load_recipe("sra-small", overrides) for overrides in ([*own, ours], own))
    value = flag.partition("=")[2]
    if value and "{" not in ours and value != "batch":
        assert_set(recipe.model_dump(), ours, value)
    assert recipe != shipped


def assert_set(recipe: dict, override: str, value: str) -> None:
    """The key has the flag's value."""
    key, given = override.split("=")
    assert given == value
    for part in key.split("."):
        recipe = recipe[part]
    assert str(recipe) == str(yaml.safe_load(value))
