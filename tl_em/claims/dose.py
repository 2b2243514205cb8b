"""The strength at which an intervention pushes the model as far as another one does: equal KL at the last token.

    find s such that  mean over prompts of KL(untouched || s-fold intervention) = target

What s is, the intervention says (``Intervention.at``): a factor of the coefficient of an ``Add``, the part of the edit
that is carried out, at most 1, of all else.  The search runs along lines of log KL in log strength: through two points
where there are two, with slope 2 from one, since the KL grows about as the square; bracketed, and halved when that is
slow.  Two directions compared at the same strength differ in how far they push the model; the claim that one of them
*matters* more needs them at the same push, random directions included.

Source: KL at the last token as the measure of harm, as in Arditi et al. 2024, arXiv:2406.11717, appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tl_em.arguments import POSITIVE, SEED, checked
from tl_em.claims.arms import KL, Arm, Outcomes, Values
from tl_em.errors import NonFiniteError, NotReachedError, UsageError
from tl_em.interventions.base import Intervention, as_intervention, core
from tl_em.models.contrasts import Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.torch_state import in_plain_torch
from tl_em.stats import Estimate

_STRONGEST, _TOLERANCE, _TRIES = 2.0**10, 0.02, 40
NO_PUSH = 1e-6
"""Mean KL in nats below which there is no push to match: float32 logits are no more exact than that."""


class Calibrated(NamedTuple):
    """The intervention at the strength that was found, and the KL that it reaches.

    Args:
        intervention: at that strength.
        strength: the factor: of the coefficient that was given, or of the whole edit.
        kl: mean KL from the untreated model at the last token, in nats.
    """

    intervention: Intervention | Any
    strength: float
    kl: Estimate


@checked(intervention=as_intervention, target_kl=POSITIVE, tolerance=POSITIVE, seed=SEED)
@in_plain_torch
def calibrate(
    model: LensModel,
    intervention: Intervention | Any,
    prompts: Sequence[Prompt],
    *,
    target_kl: float,
    tolerance: float = 0.02,
    seed: int = 0,
) -> Calibrated:
    """The strength at which an intervention's mean KL from the model as it is reaches ``target_kl``.

    Args:
        model: any HookedTransformer or TransformerBridge; hooks on it belong to both sides of the comparison.
        intervention: an ``Add``, whose coefficient's sign is kept, or any other, of which a part is taken.
        prompts: on which the KL is measured, at the last token; usually neutral ones.
        target_kl: nats.
        tolerance: how far the KL may be off, as a share of the target.
        seed: seed of the interval.

    Returns:
        ``Calibrated(intervention, strength, kl)``.

    Raises:
        NotReachedError: no strength reaches the target; the message says how far it goes.
        UsageError: the target is not a positive number, or the coefficient is 0.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> parts = pair.contrasts["persona"].split(seed=0)
        >>> persona = em.difference_in_means(pair.base, parts.train, site=em.Site(2), position="prompt_end")
        >>> found = em.calibrate(pair.base, em.Add(persona), parts.test.negative[:8], target_kl=0.1)
        >>> abs(found.kl.value - 0.1) < 0.01
        True
    """
    if getattr(core(intervention), "coefficient", 1) == 0:
        raise UsageError("the coefficient is 0, so no multiple of it changes anything; pass em.Add(direction)")
    arm = Arm("calibration", model, prompts, None, {}, seed=seed)
    dial = Dial(arm, intervention)
    strength = dial.strength(target_kl, near=1.0, tolerance=tolerance)
    if strength is None:
        raise NotReachedError(_unreached(dial, target_kl))
    return Calibrated(intervention.at(strength), strength, arm.mean(dial.kl(strength), KL))


def _unreached(dial: Dial, target: float) -> str:
    name, pushes = type(dial.intervention).__name__, {s: dial.push(s) for s in dial.known}
    far, furthest = max(((s, kl) for s, kl in pushes.items() if math.isfinite(kl)), key=lambda each: each[1])
    overflows = not all(map(math.isfinite, pushes.values()))
    why = "beyond it the model overflows" if overflows else "which is as strong as it gets"
    return (
        f"{name} does not reach a mean KL of {target:g} nats: up to {far:g} times its full strength it reaches "
        f"{furthest:.3g}, {why}. Nothing can be compared at that push; choose a target_kl below {furthest:.3g}, or "
        "another intervention (an Add has no upper end, an ablation does)"
    )


class Treated(NamedTuple):
    """What a treatment does to each prompt.

    Args:
        strength: multiple of the intervention; NaN where there is none.
        found: every metric of the arm, and the KL.
        note: why a number is missing or not where it was wanted.
    """

    strength: float
    found: Outcomes
    note: str = ""

    @property
    def push(self) -> float:
        """Mean KL, in nats."""
        return float(self.found[KL].mean())


@dataclass(frozen=True, eq=False)
class Dial:
    """One intervention in an arm, at any strength, and how far it pushes; each strength is run once.

    Args:
        arm: where.
        intervention: at strength 1.
    """

    arm: Arm
    intervention: Intervention | Any
    known: dict[float, Values] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self.arm.kl  # of the model as it is now, and not under the first intervention

    @property
    def ends(self) -> bool:
        """Whether there is a strongest one, and none with the other sign."""
        return math.isfinite(self.intervention.strongest)

    def kl(self, strength: float) -> Values:
        """KL of each prompt; infinite where the model overflows."""
        if strength not in self.known:
            try:
                self.known[strength] = self.arm.treated(self.intervention.at(strength), only=[KL])[KL]
            except NonFiniteError:
                self.known[strength] = np.full(len(self.arm.prompts), math.inf)
        return self.known[strength]

    def push(self, strength: float) -> float:
        """Mean KL, in nats."""
        return float(self.kl(strength).mean())

    def strength(self, target: float, *, near: float, tolerance: float = _TOLERANCE) -> float | None:
        """Where the mean KL passes ``target``, with the sign of ``near``; ``None`` if it does not."""
        sign, limit = -1.0 if near < 0 else 1.0, min(self.intervention.strongest, _STRONGEST)
        new = min(abs(near) if math.isfinite(near) else 1.0, limit)
        for tries in range(_TRIES):
            if abs(self.push(sign * new) - target) <= tolerance * target:
                return sign * new
            tried = {abs(s): self.push(s) for s in self.known if s * sign > 0}
            if max(s for s in tried) == limit and max(tried.values()) < target:
                return None
            last, new = new, min(_next(target, tried, halve=tries > _TRIES // 2), limit)
            if abs(new - last) < min(1e-5, tolerance / 10) * last:
                return None
        return None

    def at(self, strength: float, note: str = "") -> Treated:
        """Everything measured at a strength; NaN where the model overflows."""
        known = {KL: self.known[strength]} if strength in self.known else {}
        wanted = [name for name in (*self.arm.metrics, KL) if name not in known]
        try:
            found = self.arm.treated(self.intervention.at(strength), only=wanted)
        except NonFiniteError:
            return self.missing(strength, "the model overflows")
        return Treated(strength, {**found, **known}, note)

    def reaching(self, kl: float, *, near: float, note: str = "") -> Treated:
        """Measured where the mean KL is ``kl``, or as far as it goes; with the sign of ``near``."""
        if not kl > NO_PUSH:
            return self.missing(math.nan, "there is no push to match")
        strength = self.strength(kl, near=near)
        if strength is not None:
            return self.at(strength, note)
        if self.ends:
            return self.at(1.0, f"as far as it goes: it does not reach a KL of {kl:.3g}")
        return self.missing(math.nan, f"no strength reaches a KL of {kl:.3g}, or the model overflows before")

    def missing(self, strength: float, note: str) -> Treated:
        """Nothing was measured, and why."""
        return Treated(strength, self.arm.nothing, note)


def _next(target: float, tried: dict[float, float], *, halve: bool) -> float:
    """The next strength to try: on a line through the nearest two, of log KL in log strength; with slope 2 from one.

    Example:
        >>> _next(4.0, {1.0: 1.0}, halve=False), _next(4.0, {1.0: 1.0, 4.0: 16.0}, halve=False)
        (2.0, 2.0)
    """
    high = min((s for s, kl in tried.items() if kl >= target), default=math.inf)
    below = sorted(s for s in tried if s < high)[-2:]
    if not below:
        return high * max(math.sqrt(target / tried[high]), 0.05)
    low = below[-1]
    ends = (low, high) if high < math.inf else (below[0], low)
    first, second = (math.log(max(tried[s], NO_PUSH * target)) for s in ends)
    slope = (second - first) / math.log(ends[1] / ends[0]) if ends[0] < ends[1] else 2.0
    if high == math.inf:
        return low * math.exp(min(max((math.log(target) - second) / max(slope, 0.5), 0.05), math.log(16)))
    share = 0.5 if halve or not math.isfinite(slope) else (math.log(target) - first) / (second - first)
    return low * (high / low) ** min(max(share, 0.02), 0.98)
