"""The recipe: everything that decides what a run computes."""

from typing import Literal, TypeVar

from pydantic import Field, model_validator

from sra_ds.config.base import Part
from sra_ds.config.data import DataConfig
from sra_ds.config.losses import LossesConfig, NoTerm
from sra_ds.config.model import (
    ChannelConfig,
    CosineRouterConfig,
    ModelConfig,
    MoEChannelConfig,
    PreManifestHeadConfig,
    ResonanceConfig,
    RouterConfig,
    StaticMemoryConfig,
    WaveletsConfig,
)
from sra_ds.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ParallelConfig,
    TrainingConfig,
)

RouterKind = TypeVar("RouterKind")


def _router(channel: ChannelConfig, kind: type[RouterKind]) -> RouterKind | None:
    """The channel's router if it has one of that kind."""
    router = getattr(channel, "router", None)
    return router if isinstance(router, kind) else None


class Recipe(Part):
    """A named run: data, model, losses, training and what is written."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Part of the run directory's name."""
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
        if training.selection_bias_rate and not _router(channel, RouterConfig):
            raise ValueError("training.selection_bias_rate needs a router with scores")
        if isinstance(channel, MoEChannelConfig) and training.top_k_schedule:
            ks = [int(k) for _, k in training.top_k_schedule]
            if channel.expert_kind == "block" and min(ks) < channel.experts:
                raise ValueError("training.top_k_schedule: expert_kind=block runs all experts")
            if max(ks) > channel.experts or ks[-1] != channel.top_k:
                raise ValueError(
                    f"training.top_k_schedule must stay within experts={channel.experts} and end "
                    f"at model.channel.top_k={channel.top_k}, got {ks}"
                )
        cosine = _router(channel, CosineRouterConfig)
        if training.temperature_schedule and not (cosine and cosine.temperature == "fixed"):
            raise ValueError(
                "training.temperature_schedule needs a cosine router with temperature=fixed"
            )
        return self

    @model_validator(mode="after")
    def _remedies_have_an_effect(self) -> "Recipe":
        channel, remedies = self.model.channel, self.training.remedies
        if remedies.reseed_dead_anchors and not _router(channel, CosineRouterConfig):
            raise ValueError(
                "training.remedies.reseed_dead_anchors needs a router with anchors it can move (cosine)"
            )
        if remedies.raise_floor and not _router(channel, RouterConfig):
            raise ValueError("training.remedies.raise_floor needs a router with scores")
        if remedies.raise_floor and self.training.selection_bias_rate:
            raise ValueError(
                "training.remedies.raise_floor and training.selection_bias_rate both move the selection "
                "bias; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _losses_have_an_effect(self) -> "Recipe":
        losses, channel = self.losses, self.model.channel
        routed = isinstance(channel, MoEChannelConfig)
        if not routed and (not isinstance(losses.balance, NoTerm) or losses.z_weight):
            raise ValueError("losses.balance and losses.z_weight need model.channel.kind=moe")
        if not isinstance(losses.dispersion, NoTerm) and not _router(channel, CosineRouterConfig):
            raise ValueError("losses.dispersion needs a router with anchors it can move (cosine)")
        return self

    @model_validator(mode="after")
    def _penalties_have_an_effect(self) -> "Recipe":
        model = self.model
        mixer, head = model.mixer, model.head
        soft = isinstance(mixer, ResonanceConfig) and mixer.iterations > 1
        soft = soft and mixer.halting == "soft"  # type: ignore[union-attr]
        channel = model.channel
        compared = isinstance(channel, MoEChannelConfig) and channel.compare_outputs
        taught = (
            isinstance(channel, MoEChannelConfig)
            and channel.ghosts.count
            and channel.ghosts.background
        )
        supervised = isinstance(head, PreManifestHeadConfig) and head.deep_supervision
        filters = mixer.filters if isinstance(mixer, WaveletsConfig) else None
        for name, there, needed in (
            ("ponder_weight", soft, "mixer.kind=resonance with halting=soft and some iterations"),
            ("entropy_weight", soft, "mixer.kind=resonance with halting=soft and some iterations"),
            ("memory_weight", isinstance(model.memory, StaticMemoryConfig), "memory.kind=static"),
            ("orthogonality_weight", compared, "channel.compare_outputs=true"),
            ("ghost_weight", taught, "channel.ghosts.background=true"),
            ("supervision_weight", supervised, "head.deep_supervision=true"),
            ("wavelet_weight", filters == "learnable", "mixer.filters=learnable"),
        ):
            weight = getattr(self.losses, name)
            if not there and weight not in (0, LossesConfig.model_fields[name].default):
                raise ValueError(f"losses.{name}={weight:g} has no effect without model.{needed}")
        return self

    @model_validator(mode="after")
    def _experts_can_be_compared(self) -> "Recipe":
        channel, watched = self.model.channel, self.training.specialisation
        if watched is None:
            return self
        several = isinstance(channel, MoEChannelConfig) and channel.experts > 1
        if not several or self.parallel.expert_parallel_size > 1:
            raise ValueError(
                "training.specialisation compares the outputs of all experts: it needs "
                "model.channel.kind=moe with several and parallel.expert_parallel_size=1"
            )
        compared = isinstance(channel, MoEChannelConfig) and channel.compare_outputs
        if watched.target is not None and not (compared and self.losses.orthogonality_weight):
            raise ValueError(
                "training.specialisation.target moves the orthogonality loss: it needs "
                "model.channel.compare_outputs=true and a losses.orthogonality_weight above 0"
            )
        return self

    @model_validator(mode="after")
    def _ghosts_are_there_to_wake(self) -> "Recipe":
        channel, training = self.model.channel, self.training
        ghosts = channel.ghosts if isinstance(channel, MoEChannelConfig) else None
        # where they learn in the background, there were some before their number was set to 0
        known = ghosts is not None and (ghosts.count or ghosts.background)
        if training.ghosts is not None and not known:
            raise ValueError("training.ghosts needs model.channel.ghosts.count")
        taught = ghosts is not None and ghosts.count and ghosts.background
        if taught and not self.losses.ghost_weight:
            raise ValueError(
                "model.channel.ghosts.background teaches nothing with losses.ghost_weight=0"
            )
        constant = training.schedule.kind == "constant"
        if training.ghosts is not None and constant and training.ghosts.learning_rate == "inverse":
            raise ValueError(
                "training.ghosts.learning_rate=inverse is 0 at the peak, where "
                "training.schedule.kind=constant stays: use same or complementary"
            )
        if ghosts is not None and ghosts.count and training.remedies.active:
            raise ValueError(
                "training.remedies judge a fixed set of experts and model.channel.ghosts add to it; "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _windows_fit(self) -> "Recipe":
        stride, length = self.evaluation.stride, self.data.sequence_length
        if stride > length:
            raise ValueError(f"evaluation.stride={stride} exceeds data.sequence_length={length}")
        mixer = self.model.mixer
        if isinstance(mixer, WaveletsConfig) and mixer.receptive_field > length:
            raise ValueError(
                f"model.mixer.levels={mixer.levels} with families={list(mixer.families)} sees "
                f"{mixer.receptive_field} positions, more than data.sequence_length={length}; take fewer "
                "levels or a shorter filter"
            )
        return self

    @model_validator(mode="after")
    def _candidates_exist(self) -> "Recipe":
        head, tokens = self.model.head, self.data.tokenizer.vocab_size
        if isinstance(head, PreManifestHeadConfig) and head.candidates > tokens:
            raise ValueError(
                f"model.head.candidates={head.candidates} exceeds data.tokenizer.vocab_size={tokens}"
            )
        return self
