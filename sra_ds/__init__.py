"""sra_ds: interpretable mixture-of-experts language models on DeepSpeed.

The public API, loaded when first used, so that the recipe can be read without torch:

    recipe = sra_ds.load_recipe("quickstart")
    model = sra_ds.build_model(recipe)            # initial weights
    run = sra_ds.load_run(Path("runs/..."))       # a trained model with its tokenizer
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "Recipe": "sra_ds.config",
    "build_model": "sra_ds.model.language_model",
    "evaluate": "sra_ds.evaluation.perplexity",
    "generate": "sra_ds.inference.generate",
    "load_recipe": "sra_ds.config",
    "load_run": "sra_ds.inference.load",
    "prepare": "sra_ds.data.prepare",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'sra_ds' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
