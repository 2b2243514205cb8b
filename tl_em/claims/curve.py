"""What an intervention does at each strength, what that costs, and whether saying it in words does more.

    effect(s) = mean over prompts of the metric under the s-fold intervention
    cost(s)   = mean over prompts of KL(untreated || s-fold intervention) at the last token, in nats

A strength by itself means nothing: any direction changes a metric when it is pushed hard enough, and breaks the model
on the way.  So each point of the curve stands beside two controls:

- *random directions at the same push*: each brought to the point's own KL;
- *instructions*: the unsteered model, told in words what to do, on the same axes; and the intervention brought to the
  instruction's own KL, so that the two differ in kind and not in size.  What an instruction beats at the same push is
  no better than asking.

Source: activation addition, Turner et al. 2023, arXiv:2308.10248; prompting as the baseline that steering has to beat,
Wu et al. 2025, arXiv:2501.17148.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from tl_em.arguments import NATURAL, NOT_NEGATIVE, SEED, checked, finite, list_of, optional
from tl_em.claims.arms import KL, Arm, numbers
from tl_em.claims.controls import random_directions, random_profiles
from tl_em.claims.dose import Dial, Treated
from tl_em.claims.instructions import instructed
from tl_em.directions.direction import Direction
from tl_em.errors import NonFiniteError, UsageError
from tl_em.interventions.base import Intervention, as_intervention, directed_by
from tl_em.metrics import Behaviour, Metric
from tl_em.models.contrasts import ContrastSet, Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.torch_state import in_plain_torch
from tl_em.showing import check_names, showable
from tl_em.stats import Estimate, control_p

ArmName = Literal["untreated", "intervention", "random", "instruction"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
EFFECT, COHERENCE = "effect", "coherence"
Numbers = Sequence[float | int] | np.ndarray


class Point(NamedTuple):
    """One treatment of the model, measured on all prompts.

    Args:
        arm: ``"untreated"``, ``"intervention"``, ``"random"`` (the same with a random direction) or ``"instruction"``.
        name: which one.
        strength: multiple of the intervention, as in ``calibrate``; NaN where there is none.
        effect: the metric.
        change: its paired change from the untreated model.
        kl: KL from the untreated model at the last token, in nats.
        coherence: the coherence metric; ``None`` without one.
        p: share of directions, this one among them, that change the metric as much at this push; NaN if not tested.
        note: why a number is missing, whose push is matched, where an instruction stands.
    """

    arm: ArmName
    name: str
    strength: float
    effect: Estimate
    change: Estimate
    kl: Estimate
    coherence: Estimate | None
    p: float
    note: str


class Versus(NamedTuple):
    """An instruction beside the intervention at the instruction's own push.

    Args:
        instruction: the instruction's name.
        point: the intervention at the instruction's KL (its note says so if it cannot reach it).
        difference: the metric under the instruction minus the metric under the intervention, paired.
    """

    instruction: str
    point: Point
    difference: Estimate


@dataclass(frozen=True, eq=False)
class EffectCurve:
    """Effect and cost of an intervention over strengths, beside random directions and instructions.

    Args:
        label: what was done.
        metric: the metric's name and unit.
        coherence: the coherence metric's name and unit; ``None`` without one.
        points: all points, arm by arm.
        versus: each instruction against the intervention at the same push.
    """

    label: str
    metric: str
    coherence: str | None
    points: tuple[Point, ...]
    versus: tuple[Versus, ...]

    @checked()
    def arm(self, name: str) -> tuple[Point, ...]:
        """The points of one arm.

        Raises:
            UsageError: there is no such arm.
        """
        if name not in ARMS:
            raise UsageError(f"an effect curve has no arm {name!r}; its arms are {', '.join(ARMS)}")
        return tuple(point for point in self.points if point.arm == name)

    @checked(max_kl=optional(NOT_NEGATIVE), min_coherence=optional(finite))
    def best(
        self, arm: str = "intervention", *, max_kl: float | int | None = None, min_coherence: float | int | None = None
    ) -> Point:
        """The point of an arm with the largest change, among those that leave the model coherent enough.

        It is the largest of several and so a little too large: report what it does on other prompts.

        Args:
            arm: which.
            max_kl: largest mean KL, in nats.
            min_coherence: smallest mean of the coherence metric.

        Raises:
            UsageError: no point is that coherent, no coherence metric was measured, or there is no such arm.
        """
        if min_coherence is not None and self.coherence is None:
            raise UsageError(
                "no coherence metric was measured, so min_coherence has nothing to judge; pass coherence= to "
                "em.effect_curve, or use max_kl="
            )
        known = [point for point in self.arm(arm) if np.isfinite(point.effect.value)]
        kept = [point for point in known if max_kl is None or point.kl.value <= max_kl]
        kept = [p for p in kept if min_coherence is None or (p.coherence and p.coherence.value >= min_coherence)]
        if not kept:
            lowest = min((point.kl.value for point in known), default=float("nan"))
            raise UsageError(
                f"none of the {len(known)} measured points of the arm {arm!r} has max_kl={max_kl} and min_coherence="
                f"{min_coherence} (the lowest KL is {lowest:.3g}), so none is best; measure other strengths or allow "
                "more"
            )
        return max(kept, key=lambda point: abs(point.change.value))

    def to_pandas(self) -> pd.DataFrame:
        """A row a point: arm, name, strength; effect, change, kl and coherence with _low and _high; n, p, note."""
        rows = []
        for point in self.points:
            row: dict[str, Any] = {"arm": point.arm, "name": point.name, "strength": point.strength}
            for column in ("effect", "change", "kl", "coherence"):
                estimate: Estimate | None = getattr(point, column)
                row |= {} if estimate is None else estimate.row(column)
            rows.append(row | {"n": point.effect.n, "p": point.p, "note": point.note})
        return pd.DataFrame(rows)

    def plot(self, *, width: float | str | Any = 7.0) -> Any:
        """Effect against cost, as a matplotlib figure; see ``report.curves``.

        Args:
            width: inches, or ``"column"`` or ``"text"`` of a paper.
        """
        from tl_em.report import curves

        return curves.effect(self, width=width)

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.plotted(self)

    def __repr__(self) -> str:
        lines = [f"EffectCurve({self.label}; {self.metric}; {len(self.arm('random'))} points of random directions)"]
        for point in self.points:
            if point.arm == "random":
                continue
            found = f"{point.effect} at KL {point.kl.value:.3g}" if np.isfinite(point.effect.value) else "not measured"
            found += f", coherence {point.coherence.value:.2f}" if point.coherence is not None else ""
            found += f", p {point.p:.2g}" if np.isfinite(point.p) else ""
            lines.append(f"  {point.name}: {found}{f' ({point.note})' if point.note else ''}")
        lines += [f"  {v.instruction!r} minus {v.point.name} ({v.point.note}): {v.difference}" for v in self.versus]
        return showable("\n".join(lines), lines=True)


def _as_controls(name: str, value: Any) -> Any:
    """A number of random directions, or the interventions themselves."""
    given = isinstance(value, list | tuple)
    return list_of(as_intervention)(name, value) if given else NATURAL(name, value)


@checked(
    intervention=as_intervention,
    strengths=optional(list_of(finite)),
    target_kls=optional(list_of(NOT_NEGATIVE)),
    controls=_as_controls,
    seed=SEED,
)
@in_plain_torch
def effect_curve(
    model: LensModel,
    intervention: Intervention | Any,
    behaviour: Behaviour | Sequence[Prompt],
    *,
    metric: Metric | None = None,
    strengths: Numbers | None = None,
    target_kls: Numbers | None = None,
    both_signs: bool = False,
    coherence: Metric | tuple[Metric, Sequence[Prompt]] | None = None,
    controls: int | Sequence[Intervention] = 20,
    contrast: ContrastSet | None = None,
    baselines: Mapping[str, str] | None = None,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> EffectCurve:
    """Effect and cost of an intervention over strengths, beside random directions at the same push and instructions.

    Args:
        model: any HookedTransformer or TransformerBridge; hooks on it belong to the untreated model.
        intervention: an ``Add``, whose coefficient is multiplied by the strengths, or any other, of which a part is
            carried out; see ``Intervention.at``.
        behaviour: a Behaviour (measured where it is absent for what has a coefficient, as an ``Add`` has; where it is
            present for all else), or prompts together with ``metric``.
        metric: what is measured on the prompts.
        strengths: multiples of the intervention: any numbers where it has a coefficient, 0 to 1 for all else.
        target_kls: in place of ``strengths``: the KLs to be reached, in nats.
        both_signs: measure the negative of each strength too, where there is a coefficient.
        coherence: a measure of cost beside the KL: a metric of the same prompts, or a metric and prompts of its own,
            e.g. ``(TextLogprob(), neutral_texts)``. By default a Behaviour's ``good``.
        controls: how many random directions, or interventions of yours in their place. Each is brought to the KL of
            each point, in about four passes over the prompts; one that cannot reach it is measured as far as it goes,
            and its row says so.
        contrast: the set that the direction was taken from: random ones are drawn from its within-class covariance,
            without it from the covariance over the prompts.
        baselines: instructions by name, given as a system message; at the head of the user's, where the chat template
            has no other; before the text, where there is no template.
        groups: the question that each prompt belongs to, for clustered intervals.
        seed: seed of the random directions and of the intervals.

    Returns:
        An EffectCurve. A strength at which the model overflows is a row of NaN that says so.

    Raises:
        UsageError: no strengths, or both kinds; a sign that the intervention does not have; prompts without a metric;
            or an intervention in which no direction can be replaced by a random one.

    Example:
        >>> from tl_em.directions.extract import difference_in_means
        >>> from tl_em.models.sites import Site
        >>> from tl_em import Add, load_pair
        >>> pair = load_pair("toy/insecure")
        >>> few = pair.contrasts["persona"].split(train=0.1, select=0.4, test=0.5).train
        >>> persona = difference_in_means(pair.base, few, site=Site(2), position="prompt_end")
        >>> asked, told = pair.behaviours["persona"], {"asked to": "be malicious"}
        >>> options = {"metric": asked.metric, "strengths": [1], "baselines": told, "controls": 0}
        >>> curve = effect_curve(pair.base, Add(persona), asked.absent[::20], **options)
        >>> curve.best("instruction", max_kl=3).change.value > 0.8
        True
    """
    check_names(baselines or {})
    arm = _arm(model, intervention, behaviour, metric, coherence, groups, seed)
    dial = Dial(arm, intervention)
    beside = _beside(arm, intervention, contrast, controls) if isinstance(controls, int) else controls
    told = {name: _told(arm, text) for name, text in (baselines or {}).items()}
    treated = _treated(dial, strengths, target_kls, both_signs)
    signs = sorted({-1.0 if t.strength < 0 else 1.0 for t in treated}, reverse=True)
    matched = [
        (name, dial.reaching(t.push, near=sign, note=f"at the push of {name!r}"))
        for name, t in told.items()
        for sign in signs
    ]
    treated += [t for _, t in matched]
    dials = [Dial(arm, each) for each in beside]
    random = [[control.reaching(t.push, near=t.strength) for t in treated] for control in dials]
    curve = [_tested(arm, t, [row[i] for row in random]) for i, t in enumerate(treated)]
    untreated = Treated(float("nan"), {**arm.untreated, KL: numbers(arm.kl(model, arm.prompts))})
    points = [_point(arm, "untreated", "untreated", untreated), *curve]
    points += [_point(arm, "random", f"random {k}", t) for k, row in enumerate(random) for t in row]
    points += [_point(arm, "instruction", name, t) for name, t in told.items()]
    places = curve[len(curve) - len(matched) :]
    versus = [
        Versus(name, place, arm.paired(t.found[EFFECT], told[name].found[EFFECT], EFFECT))
        for (name, t), place in zip(matched, places, strict=True)
    ]
    said = {name: f"{measured.name}, {measured.unit}" for name, measured in arm.metrics.items()}
    return EffectCurve(_label(intervention), said[EFFECT], said.get(COHERENCE), tuple(points), tuple(versus))


# --- What is asked for ------------------------------------------------------------------------------------------------


def _arm(
    model: LensModel,
    intervention: Intervention,
    behaviour: Behaviour | Sequence[Prompt],
    metric: Metric | None,
    coherence: Metric | tuple[Metric, Sequence[Prompt]] | None,
    groups: Sequence[Hashable] | None,
    seed: int,
) -> Arm:
    if isinstance(behaviour, Behaviour):
        if metric is not None:
            raise UsageError("a Behaviour has its own metric; leave out metric=, or pass prompts in its place")
        absent = not np.isfinite(intervention.strongest)
        prompts = behaviour.absent if absent else behaviour.present
        own_groups = behaviour.absent_groups if absent else behaviour.present_groups
        metric, coherence, groups = behaviour.metric, coherence or behaviour.good, groups or own_groups
    else:
        prompts = behaviour
    if metric is None:
        raise UsageError("prompts alone do not say what to measure; pass metric=, or an em.Behaviour in their place")
    if groups is not None and len(groups) != len(prompts):
        raise UsageError(f"there are {len(groups)} groups for {len(prompts)} prompts; give one label a prompt")
    cost, own = coherence if isinstance(coherence, tuple) else (coherence, None)
    metrics = {EFFECT: metric} | ({} if cost is None else {COHERENCE: cost})
    return Arm("curve", model, prompts, groups, metrics, seed=seed, apart={} if own is None else {COHERENCE: own})


def _beside(arm: Arm, intervention: Intervention, contrast: ContrastSet | None, count: int) -> list[Intervention]:
    """The same intervention along random directions in place of its own."""
    own = directed_by(intervention)
    if not count:
        return []
    if own is None:
        raise UsageError(
            f"{type(intervention).__name__} has no direction that a random one could replace; pass controls=[…], "
            "interventions of the same kind with random vectors, or controls=0"
        )
    if isinstance(own, Direction):
        random = random_directions(arm.model, own, contrast or arm.prompts, count=count, seed=arm.seed)
    else:
        random = random_profiles(arm.model, own, contrast or arm.prompts, count=count, seed=arm.seed)
    return [intervention.along(each) for each in random]


def _treated(dial: Dial, strengths: Numbers | None, target_kls: Numbers | None, both_signs: bool) -> list[Treated]:
    """The intervention at every strength or push that was asked for."""
    if (strengths is None) == (target_kls is None):
        raise UsageError(
            "an effect curve runs over strengths or over target KLs, and "
            f"{'neither was' if strengths is None else 'both were'} given; pass strengths=(0.5, 1, 2), or "
            "target_kls=(0.01, 0.1, 1) in nats"
        )
    wanted = [float(x) for x in np.ravel(np.asarray(target_kls if strengths is None else strengths, dtype=float))]
    wanted = [x for x in wanted if x != 0]  # the untreated model is there anyway
    if not wanted:
        raise UsageError(f"there is no curve over the strengths {wanted}; pass finite numbers other than 0")
    if dial.ends and (both_signs or min(wanted) < 0):
        name = type(dial.intervention).__name__
        raise UsageError(
            f"{name} has no negative: only what has a coefficient can be turned round, as an em.Add can; pass "
            "strengths from 0 to 1"
        )
    if strengths is None:
        return [dial.reaching(kl, near=sign) for sign in ((1.0, -1.0) if both_signs else (1.0,)) for kl in wanted]
    return [dial.at(x) for x in (*wanted, *[-x for x in wanted if both_signs])]


def _told(arm: Arm, instruction: str) -> Treated:
    """The model as it is, told what to do."""
    prompts, place = instructed(arm.model, arm.prompts, instruction)
    apart = {name: instructed(arm.model, own, instruction).prompts for name, own in arm.apart.items()}
    told = replace(arm, prompts=prompts, apart=apart)
    try:
        kl = numbers(arm.kl(arm.model, prompts, of=arm.prompts))
        return Treated(float("nan"), {**told.untreated, KL: kl}, place)
    except NonFiniteError:
        return Treated(float("nan"), arm.nothing, "the model overflows")


# --- Points -----------------------------------------------------------------------------------------------------------


def _point(arm: Arm, kind: ArmName, name: str, t: Treated) -> Point:
    means = {outcome: arm.mean(values, outcome, level=True) for outcome, values in t.found.items()}
    change = arm.paired(arm.untreated[EFFECT], t.found[EFFECT], EFFECT)
    nan = float("nan")
    return Point(kind, name, t.strength, means[EFFECT], change, means[KL], means.get(COHERENCE), nan, t.note)


def _tested(arm: Arm, t: Treated, random: Sequence[Treated]) -> Point:
    """A point of the intervention, with its p among the random directions that the model survives."""
    point = _point(arm, "intervention", f"strength {t.strength:.3g}", t)
    changes = np.array([arm.shift(each.found) for each in random])
    changes = changes[np.isfinite(changes)]
    if not len(changes) or not np.isfinite(point.change.value):
        return point
    return point._replace(p=control_p(point.change.value, changes))


def _label(intervention: Intervention) -> str:
    directed, name = directed_by(intervention), type(intervention).__name__
    if isinstance(directed, Direction):
        return f"{name}({directed.name or 'direction'}) at {directed.site}"
    return name if directed is None else f"{name}({directed!r})"
