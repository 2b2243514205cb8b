"""What a direction does: behaviour under ablation in the tuned model and under addition in the base.

    ablate in tuned   behaviour untreated - treated, on prompts that show the behaviour; treated: the component along
                      the direction is set to its mean where the behaviour is absent: over the tuned model's prompts
                      that do not show it or, where these are the same prompts (the behaviour is the model's), over the
                      base's
    add in base       behaviour treated - untreated, on prompts that do not show it; treated: + 1 x the raw vector

Both are positive when the direction carries the behaviour.  The control is the same treatment with random directions
of the base's within-class covariance and the real direction's length, on a random sample of the prompts: an effect is
ranked among theirs on these very prompts, since prompts differ in how far any push moves them.  They are run in parts,
and no more of them once none of the others could give a word (:func:`controlled`): the word is that of all of them.

What removes and what induces are values: ``Use(remove=…, induce=…)`` asks the same of any other intervention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.claims.arms import Arm
from tl_em.claims.claim import Case, Finding, Question
from tl_em.claims.rule import in_reach
from tl_em.directions.direction import Direction
from tl_em.errors import UsageError
from tl_em.interventions.base import Intervention, as_intervention
from tl_em.interventions.edits import Ablate, Add
from tl_em.metrics import Behaviour, Metric
from tl_em.models.class_means import mean_activation
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair
from tl_em.models.prompts import position_of_asking
from tl_em.stats import Estimate, Resampled

CONTROL_PROMPTS = 16
FIRST = 39
"""Controls that every arm has: one more of them lies within the range of these 19 times in 20."""
TREATED = "random directions with the same treatment"
ABLATE, ADD = "ablate in tuned", "add in base"
SMALLEST: dict[str, float] = {"probability": 0.05, "log-odds": 0.5}
"""Smallest effect of interest of a behaviour, by the unit that it is measured in."""
Treatment = Callable[[Direction, Float[Tensor, " d_model"]], Intervention]


def ablate(direction: Direction, centre: Float[Tensor, " d_model"]) -> Intervention:
    """Set the component along the direction to the centre's."""
    return Ablate(direction, around=centre)


def add(direction: Direction, centre: Float[Tensor, " d_model"]) -> Intervention:
    """Add the raw vector once; the centre plays no part."""
    return Add(direction)


@dataclass(frozen=True, eq=False, repr=False)
class Use(Question):
    """The question *use*: does the direction drive the behaviour?  See the head of this file.

    Args:
        remove: makes the intervention that takes the direction out of the tuned model, of the direction and of the
            mean activation where the behaviour is absent; ``Ablate`` around that by default.
        induce: makes the one that brings it into the base; ``Add`` by default.

    Example:
        >>> Use(remove=lambda direction, centre: Ablate(direction)).name
        'use'
    """

    remove: Treatment | Any = ablate
    induce: Treatment | Any = add

    name, words, unit, smallest = "use", ("causal", None), "change of the behaviour", SMALLEST["probability"]
    asks = "Does the direction drive the behaviour?"
    measured = (
        "Change of the behaviour when the direction is ablated in the tuned model and when it is added in the base, at "
        "the same site."
    )
    of_change = False

    def measure(self, case: Case) -> Finding | None:
        """Ablate in tuned, add in base, and judge by the weaker arm.

        Raises:
            UsageError: the behaviour's unit has no smallest effect of interest, or what removes or induces makes no
                intervention along a direction.
        """
        if case.behaviour is None:
            return None
        vectors, edits, both = self._arms(case)
        return controlled(both, edits, vectors, lambda measured: self._found(case, measured))

    def seconds(self, case: Case) -> float:
        """About how long all controls of both arms would take, from eight of them on one prompt."""
        if case.behaviour is None:
            return 0.0
        vectors, edits, both = self._arms(case)
        return sum(_seconds(arm, edit, vectors) for arm, edit in zip(both, edits, strict=True))

    def at_random(self, case: Case, draws: int) -> Iterator[Finding]:
        """The same of random directions in the direction's place: a word is false.

        Args:
            case: as for :meth:`measure`; it has a behaviour.
            draws: how many directions; they are none of the controls.
        """
        vectors, edits, both = self._arms(case)
        others = _as_long(case, replace(case, n_controls=draws, seed=case.seed + 1).controls())
        measured = [TreatedArm(arm, edit, vectors).beside(len(vectors)) for arm, edit in zip(both, edits, strict=True)]
        treated = [arm.along(edit, others, arm.first) for arm, edit in zip(both, edits, strict=True)]
        for each in zip(*treated, strict=True):
            effects = [_effect(arm, values) for arm, values in zip(both, each, strict=True)]
            yield self._found(case, [m._replace(effect=effect, beside=beside)
                                     for m, (effect, beside) in zip(measured, effects, strict=True)])  # fmt: skip

    def _arms(self, case: Case) -> tuple[Float[Tensor, "control d_model"], list[Intervention], tuple[Arm, Arm]]:
        """The controls, and what is done in either arm."""
        behaviour, direction, pair = case.behaviour, case.direction, case.pair
        assert behaviour is not None
        smallest_effect(behaviour.metric)  # or why there is none, before anything is run
        centre = _absent(pair, direction, behaviour)
        edits = [self._made(which, direction, centre) for which in ("remove", "induce")]
        return _as_long(case, case.controls()), edits, arms(pair.base, pair.tuned, behaviour, seed=case.seed)

    def removal(self, pair: ModelPair, direction: Direction, behaviour: Behaviour) -> Intervention:
        """What takes the direction out of the tuned model.

        Args:
            pair: base and tuned.
            direction: at its site.
            behaviour: what it may cause.
        """
        return self._made("remove", direction, _absent(pair, direction, behaviour))

    def _found(self, case: Case, both: Sequence[ArmResult]) -> Finding:
        """What is judged: the weaker arm, and the other beside it."""
        behaviour = case.behaviour
        assert behaviour is not None
        metric, smallest = behaviour.metric, smallest_effect(behaviour.metric)
        measured: dict[str, ArmResult] = dict(zip((ABLATE, ADD), both, strict=True))
        weaker, stronger = sorted(measured, key=lambda name: measured[name].effect.estimate.low)
        known = {"direction": case.name, "behaviour": behaviour.name}

        def found(name: str, said: str, **more: Any) -> Finding:
            one, unit = measured[name], f"{metric.unit} of {metric.name} ({said})"
            return case.finding(
                self, one.effect, controls=one.controls, control=TREATED, smallest=smallest, unit=unit,
                beside=one.beside, **more,
            )  # fmt: skip

        return found(
            weaker, f"{weaker}, the weaker arm", arms=[found(stronger, stronger)],
            detail={name: m.effect.estimate for name, m in measured.items()},
            table=[row | known for m in measured.values() for row in m.rows],
        )  # fmt: skip

    def _made(self, which: str, direction: Direction, centre: Float[Tensor, " d_model"]) -> Intervention:
        make = getattr(self, which)
        if not callable(make):
            raise UsageError(
                f"Use({which}=…) is a {type(make).__name__}, and each direction needs an intervention of its own; pass "
                "a function, as in lambda direction, centre: em.Ablate(direction, around=centre)"
            )
        made = as_intervention(f"what Use({which}=…) returned", make(direction, centre))
        made.along(direction)  # which says what is wrong where random directions cannot take its place
        return made


def _absent(pair: ModelPair, direction: Direction, behaviour: Behaviour) -> Float[Tensor, " d_model"]:
    """The mean activation where the behaviour is absent."""
    return mean_activation(
        pair.base if behaviour.same_prompts else pair.tuned, behaviour.absent, site=direction.site,
        position=position_of_asking(direction.position, behaviour.absent),
    )  # fmt: skip


def smallest_effect(metric: Metric, given: float | None = None) -> float:
    """The smallest effect of interest of a metric: what was given, or what is fixed for its unit.

    Raises:
        UsageError: none is fixed for this unit.
    """
    if given is None and metric.unit not in SMALLEST:
        raise UsageError(
            f"{metric.name} is measured in {metric.unit}, for which no smallest effect of interest is fixed; use a "
            f"metric in {' or '.join(SMALLEST)} (or, to verify latents, pass smallest=)"
        )
    return float(SMALLEST[metric.unit] if given is None else given)


def outcomes(behaviour: Behaviour) -> dict[str, Metric]:
    """What is measured of a behaviour: the bad, and the good beside it where it has one."""
    return {"bad": behaviour.metric} | ({} if behaviour.good is None else {"good": behaviour.good})


def arms(base: LensModel, tuned: LensModel, behaviour: Behaviour, *, seed: int = 0) -> tuple[Arm, Arm]:
    """Where the direction is taken out, and where it is brought in."""
    metrics = outcomes(behaviour)
    return (
        Arm(ABLATE, tuned, behaviour.present, behaviour.present_groups, metrics, sign=-1, seed=seed),
        Arm(ADD, base, behaviour.absent, behaviour.absent_groups, metrics, seed=seed),
    )


class ArmResult(NamedTuple):
    """One arm's effect, on all prompts and on those of the controls; the same under each control; and the rates."""

    effect: Resampled
    beside: float
    controls: Float[np.ndarray, " control"]
    rows: list[dict[str, Any]]


def _as_long(case: Case, vectors: Float[np.ndarray, "control d_model"]) -> Float[Tensor, "control d_model"]:
    """Vectors as long as the direction."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return torch.from_numpy(vectors / lengths * case.direction.norm).float()


class TreatedArm:
    """One arm under its treatment, and under as many controls as were asked for until now.

    Args:
        arm: the model with its prompts.
        edit: the treatment.
        vectors: the controls, which take the place of its direction.
    """

    def __init__(self, arm: Arm, edit: Intervention, vectors: Float[Tensor, "control d_model"]) -> None:
        self.arm, self.edit, self.vectors = arm, edit, vectors
        self._sample = _sample(arm)
        self._few, self._treated = arm.some(self._sample), arm.treated(edit, only=list(arm.metrics))
        self._random = {outcome: np.empty((0, len(self._sample))) for outcome in arm.metrics}

    def beside(self, count: int) -> ArmResult:
        """The effect, and that of the first ``count`` controls."""
        arm, rows, controls = self.arm, [], {}
        for outcome, metric in arm.metrics.items():
            before = arm.untreated[outcome]
            random = self._along(outcome, count if outcome == arm.first else min(count, 99))
            # Moved by what the sample's own mean differs from that of all prompts, so that the table's columns compare.
            shifts = random.mean(1) - before[self._sample].mean()
            controls[outcome] = arm.sign * shifts
            cells = {
                "untreated": arm.mean(before, outcome, level=True),
                "treated": arm.mean(self._treated[outcome], outcome, level=True),
                "random": Estimate.band(before.mean() + shifts),
            }
            known = {"arm": arm.name, "outcome": outcome, "metric": metric.name, "unit": metric.unit}
            rows += [known | {"condition": name} | e.row() | {"method": e.method} for name, e in cells.items()]
        return ArmResult(*_effect(arm, self._treated[arm.first]), controls[arm.first], rows)

    def _along(self, outcome: str, count: int) -> Float[np.ndarray, "control prompt"]:
        known = self._random[outcome]
        if more := len(self.vectors[len(known) : count]):
            found = self._few.along(self.edit, self.vectors[len(known) : len(known) + more], outcome)
            self._random[outcome] = np.concatenate([known, found])
        return self._random[outcome]


def controlled(
    arms: Sequence[Arm],
    edits: Sequence[Intervention],
    vectors: Float[Tensor, "control d_model"],
    found: Callable[[list[ArmResult]], Finding],
) -> Finding:
    """What is found beside all controls, or beside as many as show that no word is in reach.

    First :data:`FIRST` of them are run, then about twice as many each time.  Before each further part the rule is asked
    what it would say if none of those that are left did as much: where even then there is no word, they are not run.

    The word is that of all controls, so this is no other rule (a curtailed test).  The p of a test that stopped is the
    share of those that were run, which is never too small (Besag and Clifford 1991, Biometrika 78:301).

    Args:
        arms: what the effect is measured in.
        edits: the treatment of each.
        vectors: all controls.
        found: makes the finding from what was measured in every arm.
    """
    treated = [TreatedArm(arm, edit, vectors) for arm, edit in zip(arms, edits, strict=True)]
    planned = len(vectors)
    count = min(FIRST, planned)
    while True:
        finding = replace(found([each.beside(count) for each in treated]), planned=planned)
        if count == planned or not in_reach(finding):
            return finding
        count = min(2 * count + 1, planned)


def _seconds(arm: Arm, edit: Intervention, vectors: Float[Tensor, "control d_model"]) -> float:
    """What each further control takes on a prompt, for all controls on all of their prompts."""
    sample, clock = _sample(arm), [0.0]
    one = arm.some(sample[:1])
    for part in (vectors[:2], vectors[:2], vectors[:10]):  # the first also does what is done once
        began = time.perf_counter()
        one.along(edit, part, arm.first)
        clock.append(time.perf_counter() - began)
    return max(0.0, clock[-1] - clock[-2]) / 8 * len(vectors) * len(sample)


def _sample(arm: Arm) -> Int[np.ndarray, " prompt"]:
    """The prompts of the controls."""
    return np.random.default_rng(arm.seed).permutation(len(arm.prompts))[:CONTROL_PROMPTS]


def _effect(arm: Arm, treated: Float[np.ndarray, " prompt"]) -> tuple[Resampled, float]:
    """The effect on all prompts, and on those of the controls."""
    moved = treated - arm.untreated[arm.first]
    return arm.change({arm.first: treated}), arm.sign * float(moved[_sample(arm)].mean())
