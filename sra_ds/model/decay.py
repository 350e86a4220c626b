"""Which parameters weight decay pulls towards zero: matrices, in which small means simple."""

from torch import nn

SPARED = (
    "bias",
    "anchors",
    "ghost_anchor",
    "temperature",
    "update_gate",
    "sharpening",
    "strength",
    "decay_logit",
    "logit_scale",
    "edge_logit_EE",
    "raw_weight_M",
    "membership_EM",
    "norm_scale",
    "phase_VH",
    "frequency_shift_H",
    "mixing_logit",
    "learned_K",
    "choice_F",
)
"""Ends of the names of parameters for which zero is nothing special."""


def decays(module: nn.Module, name: str) -> bool:
    """Whether the module's parameter of this name decays."""
    return not (isinstance(module, nn.LayerNorm) or name.rstrip("0123456789").endswith(SPARED))
