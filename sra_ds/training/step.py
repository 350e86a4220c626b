"""The loss of one forward pass, the same for the trainer, the benchmarks and the self-test."""

from typing import NamedTuple

from torch import Tensor

from sra_ds.config.losses import LossesConfig
from sra_ds.losses import auxiliary_losses, total_loss
from sra_ds.model.language_model import ModelOutput
from sra_ds.moe.routing import Routing
from sra_ds.training.processes import over_ranks


class StepLoss(NamedTuple):
    """`total` is what backward starts from; `routings` are over all processes."""

    total: Tensor
    cross_entropy: Tensor
    terms: dict[str, Tensor]
    routings: list[Routing]


def step_loss(output: ModelOutput, config: LossesConfig, targets: float | None = None) -> StepLoss:
    """Cross-entropy of this process's tokens plus the weighted auxiliary terms, whose statistics are
    over all processes. Collective.

    `targets`, where micro-batches differ: how many one has on average, so that the mean over them and
    over processes is the mean over the step's tokens; penalties likewise. None: this one's own.
    """
    assert output.loss_sum is not None and output.token_count is not None
    tokens = output.token_count if targets is None else targets
    cross_entropy = output.loss_sum / tokens
    routings = over_ranks(output.routings)
    terms = auxiliary_losses(routings, output.penalties, config, tokens)
    values = {name: value for name, (value, _) in terms.items()}
    return StepLoss(total_loss(cross_entropy, terms), cross_entropy, values, routings)
