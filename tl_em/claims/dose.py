"""The strength at which an intervention pushes the model as far as another one does: equal KL at the last token.

    find s > 0 such that  mean over prompts of KL(untouched || s-fold intervention) = target

For ``Add`` s scales the coefficient; for everything else it is the part of the edit that is carried out, at most 1
(``Partial``).  The KL is 0 at s = 0; s is doubled until the target is passed, and the crossing in the
last interval is found by Brent's method (``scipy.optimize.brentq``), on the square root, which is close to linear in s.
Two directions compared at the same coefficient differ in how far they push the model; the claim that one of them
*matters* more needs them at the same push, random directions included.

Source: KL at the last token as the measure of harm, as in Arditi et al. 2024, arXiv:2406.11717, appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from tl_em.arguments import POSITIVE, SEED, checked
from tl_em.errors import NonFiniteError, NotReachedError, UsageError
from tl_em.interventions.base import Intervention, Partial, as_intervention
from tl_em.interventions.edits import Add
from tl_em.interventions.intervene import intervene
from tl_em.interventions.many import Measure, kl_from_now
from tl_em.models.contrasts import Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.modes import in_plain_torch
from tl_em.stats import Estimate, mean

_START, _LARGEST = 2.0**-6, 2.0**10


class Calibrated(NamedTuple):
    """The intervention at the strength that was found, and the KL that it reaches.

    Args:
        intervention: ``Add`` with the coefficient, or ``Partial``.
        strength: the factor: of the coefficient that was given, or of the whole edit.
        kl: mean KL from the untouched model at the last token, in nats.
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
    """
    if isinstance(intervention, Add) and not intervention.coefficient:
        raise UsageError("the coefficient is 0, so no multiple of it changes anything; pass em.Add(direction)")
    push = _Push(model, intervention, prompts, kl_from_now(model, prompts))
    low, high = _bracket(push, target_kl, 1.0 if push.partial else _LARGEST)
    strength = _crossing(push, low, high, target_kl, tolerance)
    return Calibrated(push.at(strength), strength, mean(push(strength), seed=seed))


@dataclass(frozen=True, eq=False)
class _Push:
    """KL of each prompt as a function of the strength; each strength is run once."""

    model: LensModel
    intervention: Any
    prompts: Sequence[Prompt]
    measure: Measure
    known: dict[float, np.ndarray] = field(default_factory=dict)

    @property
    def partial(self) -> bool:
        return not isinstance(self.intervention, Add)

    def at(self, strength: float) -> Any:
        if self.partial:
            return Partial(self.intervention, strength)
        return replace(self.intervention, coefficient=strength * self.intervention.coefficient)

    def __call__(self, strength: float) -> np.ndarray:
        if strength not in self.known:
            with intervene(self.model, self.at(strength)):
                self.known[strength] = self.measure(self.model, self.prompts).numpy()
        return self.known[strength]

    def kl(self, strength: float) -> float:
        return float(self(strength).mean())


def _bracket(push: _Push, target: float, largest: float) -> tuple[float, float]:
    """The first doubling that passes the target, from below."""
    low, high, furthest = 0.0, _START, 0.0
    while True:
        try:
            reached = push.kl(high)
        except NonFiniteError:
            raise NotReachedError(_unreached(push, target, furthest, low, "beyond it the model overflows")) from None
        if reached >= target:
            return low, high
        low, furthest = high, max(furthest, reached)
        if high >= largest:
            raise NotReachedError(_unreached(push, target, furthest, high, "which is as strong as it gets"))
        high = min(2 * high, largest)


def _crossing(push: _Push, low: float, high: float, target: float, tolerance: float) -> float:
    from scipy.optimize import brentq

    def off(strength: float) -> float:
        kl = max(push.kl(strength), 0.0) if strength else 0.0
        return 0.0 if abs(kl - target) <= tolerance * target else math.sqrt(kl) - math.sqrt(target)

    return float(brentq(off, low, high, xtol=1e-9, rtol=1e-6, maxiter=100))  # pyright: ignore[reportArgumentType]


def _unreached(push: _Push, target: float, furthest: float, strength: float, why: str) -> str:
    name = type(push.intervention).__name__
    return (
        f"{name} does not reach a mean KL of {target:g} nats: up to {strength:g} times its full strength it reaches "
        f"{furthest:.3g}, {why}. Nothing can be compared at that push; choose a target_kl below {furthest:.3g}, or "
        "another intervention (an Add has no upper end, an ablation does)"
    )
