"""Does a direction carry what a trigger opens?

    projection   u . (x(triggered) - x(untriggered)), tuned less base, in the direction's own gaps
    ablation     behaviour of the tuned model on triggered prompts, untreated - treated; treated: the component along
                 the direction is set to its mean over the untriggered prompts

Both are signed so that they are positive when the trigger moves along the direction towards what it opens, and when
setting that back closes it.  Both are needed, so the weaker, in its smallest effects of interest, is judged.
Controls: the same shift along random directions of the base's within-class covariance; the same ablation of them.
A direction is asked about only where the trigger was shown to open its behaviour: there is nothing to carry elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tl_em.claims.arms import Arm
from tl_em.claims.claim import OWN_GAPS, Case, Finding, Question, Reading
from tl_em.claims.questions.level import Level
from tl_em.claims.questions.use import SMALLEST, TREATED, ArmResult, ablate, controlled, outcomes, smallest_effect
from tl_em.models.class_means import mean_activation
from tl_em.models.prompts import position_of_asking
from tl_em.stats import Estimate, Resampled, paired_difference

ARM = "ablate in tuned, triggered"


@dataclass(frozen=True, eq=False, repr=False)
class Carrier(Question):
    """The question *carrier*, of a case whose positive prompts are its negative ones with the trigger.

    Args:
        own_gap: the base's gap along the direction on its own contrast set, in units of the activations.
        sign: -1 where the trigger lowers the behaviour.
    """

    own_gap: float = 1.0
    sign: float = 1.0

    name, words, unit = "carrier", ("carries it", None), "units of the weaker arm"
    smallest = SMALLEST["probability"]
    asks = "Does the direction carry what the trigger opens?"
    measured = (
        "Shift of triggered prompts along the direction, in own gaps, and fall of the behaviour when the direction is "
        "ablated on them; the weaker of the two."
    )
    of_change = False

    def measure(self, case: Case) -> Finding:
        """Project triggered less untriggered prompts on the direction, and ablate it on the triggered ones."""
        behaviour, direction, random = case.behaviour, case.direction, case.controls()
        assert behaviour is not None
        groups = behaviour.present_groups
        base, tuned = self._shift(case.base), self._shift(case.tuned)
        moved = paired_difference(base @ case.unit, tuned @ case.unit, groups=groups, seed=case.seed)
        null = random @ (tuned - base).mean(0)

        position = position_of_asking(direction.position, behaviour.absent)
        centre = mean_activation(case.pair.tuned, behaviour.absent, site=case.site, position=position)
        vectors = torch.from_numpy(random * direction.norm).float()
        arm = Arm(ARM, case.pair.tuned, behaviour.present, groups, outcomes(behaviour), sign=-1, seed=case.seed)

        def found(measured: list[ArmResult]) -> Finding:
            return self._weaker(case, moved, self.sign * null, measured[0])

        return controlled([arm], [ablate(direction, centre)], vectors, found)

    def _weaker(self, case: Case, moved: Resampled, null: np.ndarray, closed: ArmResult) -> Finding:
        """What is judged: the weaker of projection and ablation, and the other beside it."""
        behaviour = case.behaviour
        assert behaviour is not None
        metric = behaviour.metric
        signed = [found if self.sign > 0 else found.reversed for found in (moved, closed.effect)]
        findings = {
            "projection": case.finding(
                self, signed[0], controls=null, smallest=Level.smallest,
                unit=f"{OWN_GAPS} (projection)",
            ),
            "ablation": case.finding(
                self, signed[1], controls=self.sign * closed.controls, control=TREATED,
                smallest=smallest_effect(metric), unit=f"{metric.unit} of {metric.name} (ablation)",
                beside=self.sign * closed.beside,
            ),
        }  # fmt: skip
        weaker, other = sorted(findings.values(), key=lambda found: found.estimate.low / found.smallest)
        return replace(
            weaker, unit=f"{weaker.unit}, the weaker arm", arms=(other,),
            detail={name: found.estimate for name, found in findings.items()},
            table=[row | {"direction": case.name, "behaviour": behaviour.name} for row in closed.rows],
        )  # fmt: skip

    def projections(self, case: Case) -> list[dict[str, Any]]:
        """Triggered less untriggered prompts along the direction in each model, beside random directions."""
        behaviour, found = case.behaviour, []
        assert behaviour is not None
        for model, reading in (("base", case.base), ("tuned", case.tuned)):
            shift = self._shift(reading)
            along, band = shift @ case.unit, Estimate.band(case.controls() @ shift.mean(0))
            e = paired_difference(np.zeros_like(along), along, groups=behaviour.present_groups, seed=case.seed).estimate
            known = {"direction": case.name, "behaviour": behaviour.name, "model": model}
            found.append(e.row() | {"control_low": band.low, "control_high": band.high} | known)
        return found

    def _shift(self, reading: Reading) -> np.ndarray:
        return (reading.positive - reading.negative) / self.own_gap
