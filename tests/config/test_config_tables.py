"""Every choice the configuration offers has exactly one row in the table that builds it."""

from typing import Any, get_args

import pytest

from sra_ds.config.data import DataConfig
from sra_ds.config.losses import BalanceConfig, DispersionConfig, NoTerm
from sra_ds.config.model import (
    AnyRouterConfig,
    ChannelConfig,
    FeedForwardConfig,
    ModelConfig,
)
from sra_ds.data.sources import SOURCES
from sra_ds.losses import BALANCE_LOSSES, DISPERSION_LOSSES
from sra_ds.model.channels import CHANNELS
from sra_ds.model.embeddings import EMBEDDINGS
from sra_ds.model.heads import HEADS
from sra_ds.model.mixers import MIXERS
from sra_ds.moe.experts import EXPERTS, FEED_FORWARDS
from sra_ds.moe.routers import ROUTERS

TABLES = {
    "routers": (AnyRouterConfig, ROUTERS, set()),
    "experts": (FeedForwardConfig, EXPERTS, set()),
    "feed_forwards": (FeedForwardConfig, FEED_FORWARDS, set()),
    "channels": (ChannelConfig, CHANNELS, set()),
    "embeddings": (ModelConfig.model_fields["embedding"].annotation, EMBEDDINGS, set()),
    "mixers": (ModelConfig.model_fields["mixer"].annotation, MIXERS, set()),
    "heads": (ModelConfig.model_fields["head"].annotation, HEADS, set()),
    "sources": (DataConfig, SOURCES, set()),
    "balance": (BalanceConfig, BALANCE_LOSSES, {NoTerm}),
    "dispersion": (DispersionConfig, DISPERSION_LOSSES, {NoTerm}),
}


def members(choice: Any) -> set[type]:
    """The configuration classes of a union, of one class, or of either inside `Annotated`."""
    if isinstance(choice, type):
        return {choice}
    if hasattr(choice, "__metadata__"):
        return members(get_args(choice)[0])
    return {member for argument in get_args(choice) for member in members(argument)}


@pytest.mark.parametrize(("union", "table", "without_row"), TABLES.values(), ids=TABLES.keys())
def test_union_and_table_hold_the_same_choices(union, table, without_row):
    assert members(union) - without_row == set(table)
    assert without_row <= members(union)


@pytest.mark.parametrize(("union", "table", "without_row"), TABLES.values(), ids=TABLES.keys())
def test_every_choice_says_what_it_is(union, table, without_row):
    del table, without_row
    for member in members(union):
        assert member.__doc__ and member.__doc__.strip()
