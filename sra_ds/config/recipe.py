"""The recipe: everything that decides what a run computes."""

from typing import Literal

from pydantic import model_validator

from sra_ds.config.base import Part
from sra_ds.config.data import DataConfig
from sra_ds.config.losses import LossesConfig
from sra_ds.config.model import CosineRouterConfig, ModelConfig, MoEChannelConfig
from sra_ds.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ParallelConfig,
    TrainingConfig,
)


class Recipe(Part):
    """A named run: data, model, losses, training and what is written."""

    schema_version: Literal[1] = 1
    name: str
    description: str = ""
    data: DataConfig
    model: ModelConfig
    losses: LossesConfig = LossesConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _schedules_have_a_router(self) -> "Recipe":
        channel, training = self.model.channel, self.training
        routed = isinstance(channel, MoEChannelConfig)
        if training.top_k_schedule and not routed:
            raise ValueError("training.top_k_schedule needs model.channel.kind=moe")
        if training.selection_bias_rate and not routed:
            raise ValueError("training.selection_bias_rate needs model.channel.kind=moe")
        if isinstance(channel, MoEChannelConfig) and training.top_k_schedule:
            ks = [int(k) for _, k in training.top_k_schedule]
            if max(ks) > channel.experts or ks[-1] != channel.top_k:
                raise ValueError(
                    f"training.top_k_schedule must stay within experts={channel.experts} and end "
                    f"at model.channel.top_k={channel.top_k}, got {ks}"
                )
        if training.temperature_schedule and not (
            isinstance(channel, MoEChannelConfig)
            and isinstance(channel.router, CosineRouterConfig)
            and channel.router.temperature == "fixed"
        ):
            raise ValueError(
                "training.temperature_schedule needs a cosine router with temperature=fixed"
            )
        stride, length = self.evaluation.stride, self.data.sequence_length
        if stride > length:
            raise ValueError(f"evaluation.stride={stride} exceeds data.sequence_length={length}")
        return self
