"""The card that changes words most for a divergence on neutral text, found by walking.

Slopes hold where they were measured: at the dose a whole card has they may have turned round. So the way
is walked in `STEPS` steps. Each goes along slope / (F + damping), slopes taken at the gates that were
reached (natural gradient, Amari 1998, of the diagonal Fisher information), until the divergence that is
*measured* is (step / STEPS)^2 of the whole, as it would be on a straight way. The card is the place on
that way where the words, measured too, have changed most.
Letters: P experts whose slope is significant, of all layers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sra_ds.analysis.statistics import SIGNIFICANT
from sra_ds.config.steering import Scale, Steering
from sra_ds.data.loader import Batch
from sra_ds.inference.steer import steered
from sra_ds.model.language_model import LanguageModel
from sra_ds.steering.attribution import gate_slopes
from sra_ds.steering.effect import WordSets, divergence, log_probs, read_words

STEPS = 4
TRIES = 12
"""Of one step, to come as near to its divergence as `NEAR`."""
NEAR = 0.05
SAMPLE_BATCHES = 8
"""Of the neutral text, on which the divergence is measured."""
BISECTIONS = 100

Floats = NDArray[np.float64]


class Fit(NamedTuple):
    """A card's edits, and what they do where they were found."""

    edits: list[Scale]
    divergence: float
    """Nats per token."""
    before: float
    """Log odds of the words, or their probability where there are no others."""
    after: float


class Walk:
    """One model, its words, and the text that tells what a card costs."""

    def __init__(
        self,
        model: LanguageModel,
        places: Sequence[Batch],
        words: WordSets,
        neutral: Sequence[Batch],
    ) -> None:
        self.model, self.places, self.words = model, places, words
        self.sample = neutral[:: -(-len(neutral) // SAMPLE_BATCHES)]
        self.bases: list[Tensor] = [log_probs(model, batch) for batch in self.sample]

    def value(self, edits: Sequence[Scale]) -> float:
        """The words under these edits, mean over places."""
        with steered(self.model, Steering(edits=tuple(edits))):
            found = read_words(self.model, self.places, self.words)
        return float(found["log_odds" if self.words.others_S else "share"].mean())

    def divergence(self, edits: Sequence[Scale]) -> float:
        """What they cost, in nats per token."""
        return divergence(self.model, Steering(edits=tuple(edits)), self.sample, self.bases)

    def fit(self, rows: Sequence[dict[str, Any]], most: float, lower: bool = False) -> Fit:
        """Walk from the slopes of `attribute` to a divergence of `most` at most (to 5 %), for more of the
        words or less; without edits where nothing is significant or no step changes them so."""
        chosen = [row for row in rows if row["p_adjusted"] < SIGNIFICANT]
        before = self.value([])
        best = Fit([], 0.0, before, before)
        gates_P, cost_P = np.ones(len(chosen)), np.array([row["cost"] for row in chosen])
        slope_P, sign, budget = np.array([row["slope"] for row in chosen]), 1 - 2 * lower, 1.0
        for step in tqdm(range(STEPS if chosen else 0), "fitting", leave=False):
            if step:
                slope_P = self._slopes(chosen, gates_P)
            towards_P, target = sign * slope_P / cost_P, most * ((step + 1) / STEPS) ** 2
            for _ in range(TRIES):
                further_P = moved(gates_P, towards_P, cost_P, budget * target)
                edits = scales(chosen, further_P)
                measured = self.divergence(edits)
                if measured == 0 or abs(measured / target - 1) < NEAR:
                    break
                budget *= target / measured
            after = self.value(edits)
            if sign * (after - best.after) > 0:
                best = Fit(edits, measured, before, after)
            gates_P = further_P
        return best

    def _slopes(self, chosen: Sequence[dict[str, Any]], gates_P: Floats) -> Floats:
        layers_P, experts_P = np.array([(row["layer"], row["expert"]) for row in chosen]).T
        slots = [int(router.slots) for router in self.model.routers()]
        gates_LE = np.ones((len(slots), max(slots)))
        gates_LE[layers_P, experts_P] = gates_P
        slopes_BLE = gate_slopes(self.model, self.places, self.words, gates_LE)
        found_P: Floats = slopes_BLE.mean(0)[layers_P, experts_P]
        return found_P


def scales(chosen: Sequence[dict[str, Any]], gates_P: Floats) -> list[Scale]:
    """Gates as edits."""
    return [
        Scale(layer=row["layer"], expert=row["expert"], by=float(by))
        for row, by in zip(chosen, gates_P, strict=True)
    ]


def moved(gates_P: Floats, towards_P: Floats, cost_P: Floats, divergence: float) -> Floats:
    """clip(gates + b towards, 0, 2) with b as large as sum(cost (gates - 1)^2) / 2 <= divergence allows:
    the divergence if gates act independently and alike at every dose."""

    def at(scale: float) -> Floats:
        return (gates_P + scale * towards_P).clip(0, 2)

    sizes_P = np.abs(towards_P[towards_P != 0])
    if not sizes_P.size:
        return gates_P
    low, high = 0.0, float(2 / sizes_P.min())  # by then all are at their limits
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if float((cost_P * (at(middle) - 1) ** 2).sum() / 2) <= divergence:
            low = middle
        else:
            high = middle
    return at(low)
