"""How a model is trained, evaluated, saved and logged. The DeepSpeed JSON owns ZeRO and offload only."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sra_ds.config.base import BY_KIND, Part, by_name


class AdamWConfig(Part):
    """torch's AdamW, fused where the device has it; no decay on biases, norms and anchors."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    anchor_rate: float = Field(1.0, gt=0)
    """Learning rate of the anchors (or rows) of routers, over that of everything else."""


class SgdConfig(Part):
    """Plain SGD: for tests, since Adam hides gradients of the wrong scale."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: float = Field(0.1, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)


OptimizerConfig = Annotated[
    AdamWConfig | SgdConfig, Field(discriminator="kind"), by_name("kind", "adamw")
]


class ScheduleConfig(Part):
    """Learning rate over the run: linear warm-up, then the named shape down to `final` x peak."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    final: float = Field(0.0, ge=0, le=1)
    """Last learning rate as a share of the peak."""
    decay: float = Field(0.2, gt=0, le=1)
    """Share of the steps in the last, falling stage of `wsd` (warm-up, stable, decay)."""


Knot = tuple[float, float]


def _check_knots(name: str, knots: tuple[Knot, ...]) -> None:
    starts = [at for at, _ in knots]
    if starts and (starts[0] != 0.0 or starts != sorted(set(starts)) or starts[-1] >= 1.0):
        raise ValueError(f"{name}: shares of the run must rise from 0 and stay below 1: {starts}")


class RaiseFloorConfig(Part):
    """Experts under a minimum load get a larger selection bias, step by step up to a cap."""

    floor: float = Field(0.1, gt=0, lt=1)
    """Smallest load over the window that is left alone, as a share of the mean load."""
    step: float = Field(0.1, gt=0)
    """Added to the bias once a window, in units of the scores (temperature x cosine)."""
    cap: float = Field(1.0, gt=0)
    """Largest bias that steps lead to, in the same units."""


WINDOW_TOKENS = 1_000_000


class RemediesConfig(Part):
    """What a run does by itself for experts that get too few tokens; every application is logged."""

    reseed_dead_anchors: bool = False
    """Replace the anchor of an expert with fewer than 1e-4 of a window's routes by the normalised router
    input of a token."""
    raise_floor: RaiseFloorConfig | None = None
    """Raise the selection bias of experts under a minimum load; None: off, {}: with these defaults."""
    window_tokens: int = Field(WINDOW_TOKENS, gt=0)
    """Tokens that are judged together; at the end of each window, and only then, something is done."""

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        return self.reseed_dead_anchors or self.raise_floor is not None

    @model_validator(mode="after")
    def _window_has_an_effect(self) -> "RemediesConfig":
        if self.window_tokens != WINDOW_TOKENS and not self.active:
            raise ValueError(
                f"window_tokens={self.window_tokens} has no effect without reseed_dead_anchors or "
                "raise_floor"
            )
        return self


class SpecialisationConfig(Part):
    """Measuring how differently the experts of a layer answer the same tokens, 1 - CKA, and with a target
    moving the weight of the orthogonality loss towards it."""

    every: int = Field(500, gt=0)
    """Steps between measurements; the last step is measured, too."""
    tokens: int = Field(1024, ge=2)
    """Tokens that all experts answer."""
    target: float | None = Field(None, gt=0, le=1)
    """Score the weights are moved for, each layer's on its own (the published controller has 0.95); it
    must exceed what the untrained experts have. None: weights stay."""
    rate: float = Field(0.5, gt=0)
    """Step of the logarithm of a weight for a score that is 1 away."""
    dead_band: float = Field(0.02, ge=0)
    """Distance from the target that moves nothing."""
    lowest: float = Field(1e-3, gt=0)
    highest: float = Field(0.3, gt=0)
    """Bounds of a layer's weight, `losses.orthogonality_weight` included."""
    layer_decay: float = Field(0.8, gt=0, le=1)
    """At the start a layer's weight is this times that of the layer below."""

    @model_validator(mode="after")
    def _bounds_rise(self) -> "SpecialisationConfig":
        if self.lowest >= self.highest:
            raise ValueError(f"lowest={self.lowest} must be below highest={self.highest}")
        return self


class GhostScheduleConfig(Part):
    """When ghosts wake and how they start. Saturation is of training tokens, over the last steps."""

    threshold: float = Field(0.6, ge=0, le=1)
    """Saturation above which a layer asks for another expert."""
    patience: int = Field(3, ge=1)
    """Checks in a row that must ask for it."""
    every: int = Field(100, gt=0)
    """Steps between checks; a layer wakes one ghost at a check at most."""
    min_step: int = Field(1000, ge=0)
    """No ghost wakes before this step."""
    window: int = Field(100, ge=1)
    """Steps over which saturation is averaged, with weights that fall exponentially."""
    ramp_steps: int = Field(100, ge=1)
    """Steps from the first route to a ghost until it competes as any expert."""
    learning_rate: Literal["inverse", "complementary", "same"] = "inverse"
    """Of a ghost that is awake, over alpha times the peak: 1 - r, (1 - r) / 2 + 0.1 or r, where r is the
    scheduled rate over its peak. Before, ghosts learn with the scheduled rate."""


class TrainingConfig(Part):
    """One optimizer step sees `batch_size` windows, whatever the number of processes."""

    seed: int = Field(0, ge=0)
    """Seeds the weights, the order of the windows and dropout."""
    steps: int = Field(gt=0)
    """Optimizer steps of the whole run."""
    batch_size: int = Field(gt=0)
    """Windows per optimizer step over all processes."""
    micro_batch_size: int = Field(0, ge=0)
    """Windows per forward pass and process; 0: as many as one step needs. Routing statistics, and so the
    balance loss, are over the windows of one micro-batch on all processes."""
    batching: Literal["windows", "documents"] = "windows"
    """`windows`: equal windows across documents, no padding. `documents`: a micro-batch holds documents
    of similar length, cut at the sequence length, as many as fit into micro_batch_size x sequence_length
    tokens with their padding; batch_size / micro_batch_size of them make a step."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """`auto`: bf16 on a GPU that has it, else fp32."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0 switches clipping off."""
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: Annotated[ScheduleConfig, BY_KIND] = ScheduleConfig()
    top_k_schedule: tuple[Knot, ...] = ()
    """Steps [[share of the run, k], ...]; empty: `model.channel.top_k` throughout."""
    temperature_schedule: tuple[Knot, ...] = ()
    """Linear pieces [[share of the run, temperature], ...] for a router with a fixed temperature."""
    selection_bias_rate: float = Field(0.0, ge=0)
    """Step u of the auxiliary-loss-free balancing b += u sign(mean load - load); 0: off."""
    remedies: RemediesConfig = RemediesConfig()
    specialisation: SpecialisationConfig | None = None
    """Measure it, and with a target act on it; None: off, {}: with these defaults."""
    ghosts: GhostScheduleConfig | None = None
    """Wake the ghosts of `model.channel.ghosts`; None: they sleep, {}: with these defaults."""
    activation_checkpointing: bool = False
    """Recompute attention and experts in backward; routing is kept, never recomputed."""
    compile: bool = False
    """`torch.compile` each block."""

    @model_validator(mode="after")
    def _document_batches_have_a_size(self) -> "TrainingConfig":
        if self.batching == "documents" and not self.micro_batch_size:
            raise ValueError(
                "batching=documents needs micro_batch_size: times the sequence length it is the budget "
                "of tokens of a micro-batch"
            )
        return self

    @model_validator(mode="after")
    def _schedules_rise(self) -> "TrainingConfig":
        _check_knots("top_k_schedule", self.top_k_schedule)
        _check_knots("temperature_schedule", self.temperature_schedule)
        if any(k < 1 or k != int(k) for _, k in self.top_k_schedule):
            raise ValueError("top_k_schedule: k must be a whole number of at least 1")
        return self


class EvaluationConfig(Part):
    """Perplexity on the validation split."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only at the end."""
    batch_size: int = Field(32, gt=0)
    """Windows per forward pass; results do not depend on it."""
    stride: int = Field(0, ge=0)
    """Tokens scored per window; 0: the sequence length (no overlap)."""
    max_tokens: int = Field(0, ge=0)
    """Cap on the tokens of evaluations during training; 0 and the final one: the whole split."""
    legacy_sra: bool = True
    """With each evaluation of the whole split also score the published PAD-counting protocol."""


class CheckpointConfig(Part):
    """What is kept in `checkpoints/` of the run directory."""

    every: int = Field(0, ge=0)
    """Steps between checkpoints; 0: only at the end and when asked to stop."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept; older ones are deleted after the newer is verified."""
    best: bool = True
    """Keep the weights with the lowest validation loss in `checkpoints/best`."""


class LoggingConfig(Part):
    """Progress, metrics and samples."""

    every: int = Field(10, gt=0)
    """Steps between lines of `metrics.jsonl`."""
    wandb: Literal["off", "offline", "auto"] = "off"
    """`auto`: online when WANDB_API_KEY is set, else offline."""
    prompts: tuple[str, ...] = ("Return the", "The function computes")
    """Openings of the sample texts written at the end."""
    sample_tokens: int = Field(60, ge=0)
    """New tokens per sample."""


class ParallelConfig(Part):
    """Layout over processes that is not the DeepSpeed JSON's."""

    expert_parallel_size: int = Field(1, ge=1)
    """Processes that share one set of experts; divides both the processes and the experts."""
