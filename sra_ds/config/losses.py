"""Weights and forms of the auxiliary losses; the equations are in `sra_ds.losses`."""

from typing import Annotated, Literal

from pydantic import Field

from sra_ds.config.base import BY_KIND, Part


class NoTerm(Part):
    """The term is left out."""

    kind: Literal["none"] = "none"


class BalanceTerm(Part):
    """What every balance loss shares."""

    weight: float = Field(ge=0)
    of: Literal["probs", "load"] = "probs"
    """Balance the mean probabilities, or the top-k load with the probabilities' gradient."""


class Cv2BalanceConfig(BalanceTerm):
    """E times the squared coefficient of variation (SRA v1; v2's L_cv is this with weight / E)."""

    kind: Literal["cv2"] = "cv2"


class SwitchBalanceConfig(BalanceTerm):
    """E times the sum of load share times mean probability (Switch Transformer)."""

    kind: Literal["switch"] = "switch"
    of: Literal["probs"] = "probs"
    """The load is a factor already: put in the place of the probabilities it changes no gradient."""


class BandpassBalanceConfig(BalanceTerm):
    """Zero inside a corridor of expert shares, quadratic outside (SRA v2)."""

    kind: Literal["bandpass"] = "bandpass"
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)


class ElasticBalanceConfig(BalanceTerm):
    """A spring to the uniform share and a stiffer one above `ceiling` (SRA v2)."""

    kind: Literal["elastic"] = "elastic"
    ceiling: float = Field(0.010, ge=0, le=1)
    stiffness: float = Field(50.0, ge=0)


BalanceConfig = Annotated[
    NoTerm | Cv2BalanceConfig | SwitchBalanceConfig | BandpassBalanceConfig | ElasticBalanceConfig,
    Field(discriminator="kind"),
    BY_KIND,
]


class SignedDispersionConfig(Part):
    """Mean cosine of anchor pairs (published; minimised by antipodal clusters)."""

    kind: Literal["signed"] = "signed"
    weight: float = Field(ge=0)


class SquaredDispersionConfig(Part):
    """Mean squared cosine of anchor pairs: zero only for orthogonal anchors."""

    kind: Literal["squared"] = "squared"
    weight: float = Field(ge=0)


class LogMeanExpDispersionConfig(Part):
    """Log of the mean exponential of scaled cosines: a smooth maximum over pairs."""

    kind: Literal["log_mean_exp"] = "log_mean_exp"
    weight: float = Field(ge=0)
    sharpness: float = Field(10.0, gt=0)


DispersionConfig = Annotated[
    NoTerm | SignedDispersionConfig | SquaredDispersionConfig | LogMeanExpDispersionConfig,
    Field(discriminator="kind"),
    BY_KIND,
]


class LossesConfig(Part):
    """Auxiliary losses, each a mean over the layers that have it."""

    balance: BalanceConfig = NoTerm()
    dispersion: DispersionConfig = NoTerm()
    z_weight: float = Field(0.0, ge=0)
    """Weight of the mean squared log-sum-exp of the router scores."""
    ponder_weight: float = Field(1e-3, ge=0)
    """Weight of the expected number of iterations where a mixer halts softly."""
    entropy_weight: float = Field(0.0, ge=0)
    """Weight of the relative entropy of the last iteration where a mixer halts softly."""
    memory_weight: float = Field(1e-4, ge=0)
    """Weight of the squared size of the change of weights that a static memory makes."""
    orthogonality_weight: float = Field(0.1, ge=0)
    """Weight of how alike the outputs of a token's experts are, with `model.channel.compare_outputs`."""
    ghost_weight: float = Field(1e-3, ge=0)
    """Weight of the error of a ghost that learns before it is chosen, with `ghosts.background`. Small:
    all gradients are clipped together, and Adam does not mind."""
    supervision_weight: float = Field(0.3, ge=0)
    """Weight of the loss of the distributions before the last, with `model.head.deep_supervision`."""
    wavelet_weight: float = Field(1e-2, ge=0)
    """Weight of how far learned wavelet filters are from orthogonal, with `mixer.filters=learnable`."""
