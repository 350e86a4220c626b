"""Fixtures that every test may use: seeds, threads, poisoned memory and tiny recipes."""

import gc
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from families import FAMILIES, ROUTED
from sra_ds.config import Recipe
from sra_ds.config.loading import merge, validate
from sra_ds.heap import give_back_freed_memory


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors here are too small to share, and results must not depend on the number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_product_too_small() -> Iterator[None]:
    """Models here go through the operators that models of real size go through."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sra_ds.ops.linear.LEAST_WORK", 0)
        yield


@pytest.fixture(scope="module", autouse=True)
def given_back() -> Iterator[None]:
    """What a module's largest models took is not kept for the modules after it."""
    yield
    gc.collect()
    give_back_freed_memory()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, alone or in the whole set."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN, so that a kernel that forgets a row fails."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture(scope="session")
def tiny_recipe() -> Callable[..., Recipe]:
    """`tiny_recipe(family, overlay)`: a validated recipe of a few thousand weights, no dropout."""

    def build(family: str = "moe-cosine", overlay: dict[str, Any] | None = None) -> Recipe:
        tree = {
            "name": family,
            "data": {
                "source": "docstrings",
                "sequence_length": 16,
                "tokenizer": {"vocab_size": 257},
            },
            "model": {
                "width": 32,
                "layers": 2,
                "embedding": {"kind": "token", "dropout": 0.0},
                "mixer": {"kind": "attention", "heads": 2, "dropout": 0.0},
                "head": {"kind": "tied", "chunk_tokens": 13},
                **FAMILIES[family],
            },
            "training": {"steps": 10, "batch_size": 4},
        }
        return validate(merge(tree, overlay or {}))

    return build


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each kind of model in turn, for `tiny_recipe`."""
    return str(request.param)


@pytest.fixture(params=ROUTED)
def routed_family(request: pytest.FixtureRequest) -> str:
    """Each kind of routed model in turn, for `tiny_recipe`."""
    return str(request.param)
