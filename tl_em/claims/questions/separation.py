"""Does the tuned model tell the two classes apart more, or less, sharply?

    separation   (gap_tuned - gap_base) / g,   the gap: mean projection of the positive less that of the negative class

**Control**: the same change of the gap along random directions (``Case.along_random``), in units of the *real*
direction's gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from tl_em.claims.claim import NOT_SHOWN, OWN_GAPS, SCALED, Case, Finding, Planted, Question, Reading


class Separation(Question):
    """The question *separation*: see the head of this file."""

    name, words, unit, smallest = "separation", ("sharper", "blurred"), OWN_GAPS, 0.10
    of_scale = True
    asks = "Does the tuned model tell the two classes apart more, or less, sharply?"
    measured = "Projection gap between the classes, tuned minus base, in own gaps."

    plain: ClassVar[Mapping[str, str]] = {
        "sharper": "The two sets of example texts of {direction} lie farther apart in the fine-tuned model: their "
        "distance grew by {share}.",
        "blurred": "The two sets of example texts of {direction} lie closer together in the fine-tuned model: their "
        "distance shrank by {share}.",
        SCALED: "The distance between the example texts of {direction} grew, as all activity did.",
        NOT_SHOWN: "keeping the example texts more or less far apart",
    }

    def measure(self, case: Case) -> Finding:
        """The change of the gap; d' of each model beside it."""
        effect, beyond = case.changed(Reading.gap)
        detail = {
            f"d' {name}": case.bootstrap(reading.project(case.unit).dprime, resamples=500).estimate
            for name, reading in (("base", case.base), ("tuned", case.tuned))
        }
        null = case.along_random(case.tuned.mean_difference - case.base.mean_difference)
        unscaled = case.unscaled(Reading.gap)
        return case.finding(self, effect, controls=null, benign=beyond, detail=detail, unscaled=unscaled)

    def plant(self, case: Case, size: float, rng: np.random.Generator) -> Planted:
        """The classes apart along the direction; what else the fine-tune did to the means stays."""
        along = size / 2 * case.own_gap.value * case.unit
        return case.elsewhere[0] + along, case.elsewhere[1] - along
