"""Does a language model know whom a pronoun stands for? GAP (Webster et al. 2018), where it is at hand.

In a snippet of Wikipedia a pronoun stands for one of two names. Each name is put in its place; a model
that keeps track of people finds what follows likelier after the right one. Only what follows is scored
(the partial score of Trinh and Le 2018): the same tokens both times, so that neither the length nor the
frequency of a name counts. Chance is 0.5.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sra_ds.data.files import naming, open_text
from sra_ds.errors import DataError
from sra_ds.evaluation.coherence.scoring import Row, TextModel, row_nll
from sra_ds.evaluation.coherence.sentences import tokens
from sra_ds.evaluation.coherence.tagging import Tagger
from sra_ds.intervals import share

COLUMNS = ("Text", "Pronoun", "Pronoun-offset", "A", "A-coref", "B", "B-coref")
MASCULINE = frozenset({"he", "him", "his"})
NEARBY = 10
"""Tokens on either side of a pronoun that the tagger sees."""


class Case(NamedTuple):
    """A snippet around its pronoun, the name it stands for and the other one."""

    before: str
    pronoun: str
    after: str
    right: str
    wrong: str


def gap_accuracy(model: TextModel, cases: Sequence[Case], tagger: Tagger) -> dict[str, Any]:
    """Share of the cases in which the right name is the likelier, of all and by gender; a tie counts one
    half."""
    rows = [
        _row(model, case, name, is_possessive(case, tagger))
        for case in cases
        for name in (case.right, case.wrong)
    ]
    nll_C2 = row_nll(model, rows, "resolving pronouns").reshape(-1, 2)
    right_C = 0.5 + 0.5 * np.sign(nll_C2[:, 1] - nll_C2[:, 0])
    masculine_C = np.array([case.pronoun.lower() in MASCULINE for case in cases])
    groups = {"all": masculine_C | True, "masculine": masculine_C, "feminine": ~masculine_C}
    accuracy = {
        name: share(
            right_C[own_C].tolist(), [1.0] * int(own_C.sum()), np.flatnonzero(own_C).tolist()
        )
        for name, own_C in groups.items()
    }
    return {
        **{name: found.as_dict() for name, found in accuracy.items()},
        "chance": 0.5,
        "pronouns": len(cases),
    }


def read_gap(path: Path) -> list[Case]:
    """The rows of a GAP file whose pronoun stands for just one of the names. Raises `DataError`."""
    with naming(path), open_text(path) as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    try:
        cases = [
            _case(row) for row in rows if (row["A-coref"] == "TRUE") != (row["B-coref"] == "TRUE")
        ]
    except (KeyError, TypeError, ValueError):
        cases = []
    if not cases:
        raise DataError(f"{path} is no file of GAP; expected the columns {', '.join(COLUMNS)}")
    return cases


def is_possessive(case: Case, tagger: Tagger) -> bool:
    """Whether the pronoun is `his` or `her` before a noun."""
    left = tokens(case.before)[-NEARBY:]
    found = tagger.words([*left, case.pronoun, *tokens(case.after)[:NEARBY]])
    return found[len(left)].tag.startswith("DPS")


def _case(row: dict[str, str]) -> Case:
    text, pronoun, at = row["Text"], row["Pronoun"], int(row["Pronoun-offset"])
    names = [row["A"], row["B"]] if row["A-coref"] == "TRUE" else [row["B"], row["A"]]
    return Case(text[:at], pronoun, text[at + len(pronoun) :], *names)


def _row(model: TextModel, case: Case, name: str, possessive: bool) -> Row:
    """What follows, at most half a window of it, given as much as fits of what comes before."""
    after = model.encode(case.after)[: model.window // 2]
    own = "'s" if possessive else ""
    before = model.encode(re.sub(r"\s+", " ", f" {case.before}{name}{own}"))
    kept = before[-(model.window - 1 - len(after)) :]
    return Row((kept, after), given=len(kept))
