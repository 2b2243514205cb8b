"""Is the direction more, or less, present after the fine-tune?

    level   ((mean p_tuned - mean p_base) + (mean n_tuned - mean n_base)) / 2g     p, n: projections; g: the own gap

**Control**: the same shift along random directions (``Case.along_random``), in units of the *real* direction's gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from tl_em.claims.claim import NOT_SHOWN, OWN_GAPS, SCALED, Case, Finding, Planted, Question, Reading, weighted


class Level(Question):
    """The question *level*: see the head of this file."""

    name, words, unit, smallest = "level", ("exaggerated", "diminished"), OWN_GAPS, 0.10
    of_scale = True
    asks = "Is the direction more, or less, present after the fine-tune?"
    measured = (
        "Class-balanced mean projection on the direction, tuned minus base, in units of the direction's own gap (the "
        "base model's projection gap between the two classes of its contrast set)."
    )

    plain: ClassVar[Mapping[str, str]] = {
        "exaggerated": "On the same texts, the pattern {direction} is on average stronger in the fine-tuned model, by "
        "{size} times the distance between its two sets of example texts in the original model.",
        "diminished": "On the same texts, the pattern {direction} is on average weaker in the fine-tuned model, by "
        "{size} times the distance between its two sets of example texts in the original model.",
        SCALED: "The pattern {direction} is stronger in the fine-tuned model, as all of its activity is.",
        NOT_SHOWN: "being stronger or weaker",
    }

    def measure(self, case: Case) -> Finding:
        """The change of the class-balanced mean; each class shown apart."""
        effect, beyond = case.changed(Reading.balanced)
        base, tuned = case.base.project(case.unit), case.tuned.project(case.unit)
        up, down = tuned.positive - base.positive, tuned.negative - base.negative
        detail = {
            "own gap": case.own_gap,
            "positive class": case.bootstrap(lambda v, w: weighted(v, up) / base.gap(v, w)).estimate,
            "negative class": case.bootstrap(lambda v, w: weighted(w, down) / base.gap(v, w)).estimate,
        }
        shift = (case.tuned.positive - case.base.positive).mean(0) + (case.tuned.negative - case.base.negative).mean(0)
        return case.finding(
            self, effect, controls=case.along_random(shift / 2), benign=beyond, detail=detail,
            unscaled=case.unscaled(Reading.balanced),
        )  # fmt: skip

    def plant(self, case: Case, size: float, rng: np.random.Generator) -> Planted:
        """Both classes along the direction; what else the fine-tune did to the means stays."""
        along = size * case.own_gap.value * case.unit
        return case.elsewhere[0] + along, case.elsewhere[1] + along
