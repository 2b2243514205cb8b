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

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tl_em.claims.questions.changes import OWN_GAPS, RANDOM
from tl_em.claims.questions.use import Arm, measure_arm
from tl_em.claims.rule import SMALLEST_EFFECT, SMALLEST_USE, Finding
from tl_em.directions.direction import Direction
from tl_em.directions.geometry import control_directions
from tl_em.metrics import Behaviour
from tl_em.models.loading import ModelPair
from tl_em.models.means import mean_activation
from tl_em.models.stream import capture
from tl_em.stats import Estimate, control_p, paired_difference

ARM = "ablate in tuned, triggered"


@dataclass(frozen=True, eq=False)
class Carrier:
    """The finding about one direction, and the tables behind it."""

    finding: Finding
    projections: list[dict[str, Any]]
    ablations: list[dict[str, Any]]


def carrier(
    pair: ModelPair,
    direction: Direction,
    behaviour: Behaviour,
    *,
    name: str,
    own_gap: float,
    sign: float = 1.0,
    controls: int = 999,
    seed: int = 0,
) -> Carrier:
    """Project triggered less untriggered prompts on a direction, and ablate it on the triggered ones.

    Args:
        pair: base and tuned.
        direction: of the base.
        behaviour: ``present``: the triggered prompts, ``absent``: the same without the trigger, in the same order.
        name: the direction's name.
        own_gap: the base's gap along the direction on its own contrast set, in units of the activations.
        sign: -1 where the trigger lowers the behaviour.
        controls: number of random directions.
        seed: seed of resampling and controls.
    """
    site, groups = direction.site, behaviour.present_groups
    x = {
        (model, side): capture(lens, prompts, [site], position=direction.position)[:, 0].double().cpu().numpy()
        for model, lens in (("base", pair.base), ("tuned", pair.tuned))
        for side, prompts in (("triggered", behaviour.present), ("untriggered", behaviour.absent))
    }
    random = control_directions(x["base", "triggered"], x["base", "untriggered"], count=controls, norm=1.0, seed=seed)
    shifts = {model: (x[model, "triggered"] - x[model, "untriggered"]) / own_gap for model in ("base", "tuned")}
    along = {model: shift @ direction.unit.double().numpy() for model, shift in shifts.items()}
    moved = paired_difference(along["base"], along["tuned"], groups=groups, seed=seed)
    null = random @ (shifts["tuned"] - shifts["base"]).mean(0)

    centre = mean_activation(pair.tuned, behaviour.absent, site=site, position=direction.position)
    vectors = torch.from_numpy(random * direction.norm).float()
    arm = Arm(ARM, pair.tuned, behaviour.present, groups, centre)
    closed = measure_arm(arm, direction, behaviour, vectors, seed=seed)

    unit = behaviour.metric.unit
    arms = [
        (moved.estimate.scaled(sign), SMALLEST_EFFECT["level"], sign * null, RANDOM, f"{OWN_GAPS} (projection)"),
        (closed.effect.estimate.scaled(sign), SMALLEST_USE[unit], sign * closed.controls,
         "random directions with the same treatment", f"{unit} of {behaviour.metric.name} (ablation)"),
    ]  # fmt: skip
    estimate, smallest, controlled, said, units = min(arms, key=lambda each: each[0].low / each[1])
    p = max(moved.p, closed.effect.p, *(control_p(e.value, c, two_sided=False) for e, _, c, *_ in arms))
    finding = Finding(
        "carrier", name, site, estimate, p, controlled, said, smallest, f"{units}, the weaker arm",
        detail={"projection": arms[0][0], "ablation": arms[1][0]},
    )  # fmt: skip
    known = {"direction": name, "behaviour": behaviour.name}
    drawn = [_projection(along[m], random @ shifts[m].mean(0), groups, seed) | known | {"model": m} for m in shifts]
    return Carrier(finding, drawn, [row | known for row in closed.rows])


def _projection(along: np.ndarray, null: np.ndarray, groups: Any, seed: int) -> dict[str, Any]:
    e: Estimate = paired_difference(np.zeros_like(along), along, groups=groups, seed=seed).estimate
    low, high = np.quantile(null, [0.025, 0.975])
    ends = {"control_low": float(low), "control_high": float(high), "n": e.n}
    return {"value": e.value, "low": e.low, "high": e.high} | ends
