"""Routing: which experts a token goes to and with what weight, and everything losses need to know of it.

Letters: T tokens, E experts, K experts per token. All of it in float32 at least.
"""

from typing import NamedTuple

from torch import Tensor

from sra_ds.config.model import GateForm
from sra_ds.ops.top_k_routing import Selection, top_k_routing


class Routing(NamedTuple):
    """The decisions of one router on T tokens, kept whole.

    Statistics are over valid tokens only; the sum of `load_E` is K times their number. A NamedTuple,
    because ZeRO-3's hooks look into tuples and not into dataclasses.
    """

    gates_TK: Tensor
    """Combine weights."""
    expert_ids_TK: Tensor
    """int64, in order of decreasing selection score."""
    load_E: Tensor
    """Routes per expert, as float32 so that it reduces together with the probabilities."""
    mean_probs_E: Tensor
    """Mean over valid tokens of the softmax over all experts; carries gradient."""
    lse_T: Tensor
    """Log-sum-exp of the scores; 0 at invalid tokens."""
    valid_count: Tensor
    """Number of valid tokens."""
    temperature: Tensor | None = None
    """Mean temperature, without gradient."""
    anchor_gram_EE: Tensor | None = None
    """Cosines between anchors, for routers that have anchors."""
    scores_TE: Tensor | None = None
    """Scores before the softmax, only when asked for."""


def route(scores_TE: Tensor, top_k: int, gate: GateForm, valid_T: Tensor | None = None) -> Routing:
    """`top_k_routing` of scores without bias or noise."""
    return Routing(*top_k_routing(scores_TE, top_k, gate, Selection(valid_T)))
