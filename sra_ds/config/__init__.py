"""The recipe: one frozen pydantic model per part, closed unions, loading and overrides. No torch here."""

from sra_ds.config.loading import dump_recipe, load_recipe, named_recipes
from sra_ds.config.recipe import Recipe

__all__ = ["Recipe", "dump_recipe", "load_recipe", "named_recipes"]
