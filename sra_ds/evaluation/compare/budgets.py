"""What a recipe costs, counted from the model, and whether recipes cost the same."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from sra_ds.config import Recipe
from sra_ds.errors import ConfigError
from sra_ds.model.counting import count_parameters, live_share
from sra_ds.model.flops import flops_per_token
from sra_ds.model.language_model import LanguageModel, build_model

TOLERANCE = 0.02
"""Relative to the largest: what still counts as matched."""


class Budget(BaseModel):
    """Parameters in all and those that one token uses (without routers), with the final k; floating-point
    operations of training for each token of a full window, mean over the schedule of k."""

    model_config = ConfigDict(frozen=True)
    total: int
    active: int
    flops: float


MATCHES = tuple(Budget.model_fields)


def budget(recipe: Recipe) -> tuple[Budget, float | None]:
    """What a recipe costs, and the share of the entries of sparse matrices that hold a weight."""
    model = build_model(recipe, "meta")
    counts = count_parameters(model)
    flops = _scheduled_flops(recipe, model)
    return Budget(total=counts["total"], active=counts["active"], flops=flops), live_share(model)


def _scheduled_flops(recipe: Recipe, model: LanguageModel) -> float:
    length, knots = recipe.data.sequence_length, recipe.training.top_k_schedule
    if not knots:
        return flops_per_token(model, length)
    starts = [at for at, _ in knots]
    return sum(
        (end - start) * flops_per_token(model, length, int(k))
        for (start, k), end in zip(knots, [*starts[1:], 1.0], strict=True)
    )


def apart(budgets: Sequence[Budget]) -> dict[str, float]:
    """Largest difference in each respect, as a share of the largest value."""
    values = {name: [getattr(one, name) for one in budgets] for name in MATCHES}
    return {name: (max(own) - min(own)) / max(own) for name, own in values.items()}


def require_matched(budgets: Mapping[str, Budget], wanted: Sequence[str]) -> None:
    """Raise `ConfigError` where recipes (by name) differ in what was said to be matched."""
    found = apart(list(budgets.values()))
    for name in wanted:
        if found[name] > TOLERANCE:
            values = ", ".join(
                f"{recipe}: {getattr(one, name) / 1e6:,.2f} M" for recipe, one in budgets.items()
            )
            raise ConfigError(
                f"--matched {name}: {found[name]:.1%} apart, allowed are {TOLERANCE:.0%} ({values})"
            )
