"""A model under treatment, measured on all prompts: an intervention at a strength or a push, or an instruction.

    metric, KL(untreated || treated) at the last token in nats, and a coherence metric: one number a prompt each

The push of an intervention is its mean KL. Two interventions are compared at the same push, because any vector changes
a metric when it is long enough. What cannot push that far is taken as far as it goes, and says so; where the model
overflows, every number is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.claims.instructions import instructed
from tl_em.directions.direction import Direction
from tl_em.directions.geometry import control_directions
from tl_em.errors import NonFiniteError, PositionError, UsageError
from tl_em.interventions.base import Intervention, Partial
from tl_em.interventions.edits import Add
from tl_em.interventions.intervene import intervene
from tl_em.interventions.wrappers import Conditional
from tl_em.metrics import Metric
from tl_em.models.contrasts import ContrastSet, Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.stream import capture, next_token_logits
from tl_em.stats import Estimate, mean

_STRONGEST, _TOLERANCE, _TRIES = 2.0**10, 0.02, 40
NO_PUSH = 1e-6
"""Mean KL in nats below which there is no push to match: float32 logits are no more exact than that."""

Values = Float[np.ndarray, " prompt"]


class Treated(NamedTuple):
    """What a treatment does to each prompt.

    Args:
        strength: multiple of the intervention; NaN where there is none.
        effect: the metric.
        kl: KL from the untreated model, in nats.
        coherence: the coherence metric; ``None`` without one.
        note: why a number is missing or not where it was wanted; where an instruction stands.
    """

    strength: float
    effect: Values
    kl: Values
    coherence: Values | None
    note: str


@dataclass(frozen=True, eq=False)
class Stage:
    """A model with its prompts and what is measured on them; the model as it is now is the untreated one.

    Args:
        model: any HookedTransformer or TransformerBridge.
        prompts: what the metric and the KL are measured on.
        metric: the effect.
        coherence: a metric, and the prompts that it is measured on.
        groups: the question that each prompt belongs to.
        seed: seed of the intervals.
    """

    model: LensModel
    prompts: Sequence[Prompt]
    metric: Metric
    coherence: tuple[Metric, Sequence[Prompt]] | None = None
    groups: Sequence[Hashable] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.untreated  # now, and not under the first intervention

    @cached_property
    def _encoded(self) -> list[EncodedPrompt]:
        return encode(self.model, self.prompts)

    @cached_property
    def _before(self) -> Tensor:
        return next_token_logits(self.model, self._encoded).double().log_softmax(-1)

    @cached_property
    def untreated(self) -> Treated:
        return self.measured(float("nan"), "")

    def kl(self, prompts: Sequence[Prompt] | None = None) -> Float[Tensor, " prompt"]:
        """KL(untreated || now) of each prompt, *now* on other prompts if they are given."""
        now = next_token_logits(self.model, self._encoded if prompts is None else prompts).double().log_softmax(-1)
        return (self._before.exp() * (self._before - now)).sum(-1)

    def told(self, instruction: str) -> Treated:
        """The model as it is, told what to do."""
        prompts, place = instructed(self.model, self.prompts, instruction)
        own = None if self.coherence is None else instructed(self.model, self.coherence[1], instruction).prompts
        return self.measured(float("nan"), place, prompts=prompts, own=own)

    def measured(
        self,
        strength: float,
        note: str,
        *,
        intervention: Any = None,
        prompts: Sequence[Prompt] | None = None,
        own: Sequence[Prompt] | None = None,
        kl: Tensor | None = None,
    ) -> Treated:
        """Effect, KL (unless it is known) and coherence under an intervention, or on other prompts."""
        try:
            with nullcontext() if intervention is None else intervene(self.model, intervention):
                found = [self.metric(self.model, self.prompts if prompts is None else prompts)]
                found.append(self.kl(prompts) if kl is None else kl)
                if self.coherence is not None:
                    found.append(self.coherence[0](self.model, self.coherence[1] if own is None else own))
        except NonFiniteError:
            return self.missing(strength, "the model overflows")
        effect, kls, *rest = (values.double().cpu().numpy() for values in found)
        return Treated(strength, effect, kls, rest[0] if rest else None, note)

    def missing(self, strength: float, note: str) -> Treated:
        """Nothing was measured, and why."""
        nothing = np.full(len(self.prompts), np.nan)
        own = None if self.coherence is None else np.full(len(self.coherence[1]), np.nan)
        return Treated(strength, nothing, nothing, own, note)

    def mean(self, values: Values) -> Estimate:
        """Of the prompts' values, with its interval; NaN if a value is."""
        return _mean(values, self.groups, self.seed)

    def difference(self, before: Values, after: Values) -> Estimate:
        """Mean paired difference, with its interval; NaN if a value is."""
        return _mean(after - before, self.groups, self.seed)

    def mean_coherence(self, values: Values) -> Estimate:
        """Of the coherence metric's values, clustered if its prompts are the stage's."""
        same = self.coherence is not None and self.coherence[1] is self.prompts
        return _mean(values, self.groups if same else None, self.seed)


def _mean(values: Values, groups: Sequence[Hashable] | None, seed: int) -> Estimate:
    if np.isfinite(values).all():
        return mean(values, groups=groups, seed=seed)
    nan = float("nan")
    return Estimate(nan, nan, nan, n=len(values), n_effective=nan, method="not measured", seed=seed)


@dataclass(frozen=True, eq=False)
class Dial:
    """One intervention on a stage, at any strength: the coefficient of an ``Add``, the part of anything else.

    Args:
        stage: what is measured.
        intervention: at strength 1.
    """

    stage: Stage
    intervention: Any
    _known: dict[float, Tensor] = field(default_factory=dict)  # the KLs at every strength that was run

    @property
    def partial(self) -> bool:
        return not isinstance(self.intervention, Add)

    def edit(self, strength: float) -> Any:
        """The intervention times ``strength``."""
        if self.partial:
            return Partial(self.intervention, strength)
        return replace(self.intervention, coefficient=strength * self.intervention.coefficient)

    def at(self, strength: float, note: str = "") -> Treated:
        """Measured at ``strength``."""
        known = self._known.get(strength)
        return self.stage.measured(strength, note, intervention=self.edit(strength), kl=known)

    def reaching(self, kl: float, *, near: float, note: str = "") -> Treated:
        """Measured at the strength at which the mean KL is ``kl``, or as far as it goes; with the sign of ``near``."""
        nan = float("nan")
        if not kl > NO_PUSH:
            return self.stage.missing(nan, "there is no push to match")
        sign = -1.0 if near < 0 else 1.0
        strength = self._strength(kl, sign, near)
        if strength is not None:
            return self.at(sign * strength, note)
        if self.partial:
            return self.at(1.0, f"as far as it goes: it does not reach a KL of {kl:.3g}")
        return self.stage.missing(nan, f"no strength reaches a KL of {kl:.3g}, or the model overflows before")

    def _strength(self, target: float, sign: float, near: float) -> float | None:
        """Where the mean KL passes ``target``; ``None`` if it does not."""
        limit = 1.0 if self.partial else _STRONGEST
        new = min(abs(near) if math.isfinite(near) else 1.0, limit)
        for tries in range(_TRIES):
            found = self._kl(sign * new)
            if abs(found - target) <= _TOLERANCE * target:
                return new
            tried = {abs(s): self._kl(s) for s in self._known if s * sign > 0}
            if max(s for s in tried) == limit and max(tried.values()) < target:
                return None
            last, new = new, min(_next(target, tried, halve=tries > _TRIES // 2), limit)
            if abs(new - last) < 1e-5 * last:
                return None
        return None

    def _kl(self, strength: float) -> float:
        """Infinite where the model overflows."""
        if strength not in self._known:
            try:
                with intervene(self.stage.model, self.edit(strength)):
                    self._known[strength] = self.stage.kl()
            except NonFiniteError:
                self._known[strength] = torch.full((len(self.stage.prompts),), math.inf)
        return float(self._known[strength].mean())


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


# --- Random directions ------------------------------------------------------------------------------------------------


def beside(
    stage: Stage, intervention: Any, controls: int | Sequence[Intervention], contrast: ContrastSet | None
) -> list[Dial]:
    """The same intervention with random directions in place of its own, to stand beside it.

    Args:
        stage: what is measured.
        intervention: with a direction somewhere in it.
        controls: how many; or the interventions themselves.
        contrast: its within-class covariance is drawn from; the covariance over the stage's prompts without one.

    Raises:
        UsageError: the intervention has no direction.
    """
    if not isinstance(controls, int):
        return [Dial(stage, control) for control in controls]
    if not controls:
        return []
    direction = getattr(core(intervention), "direction", None)
    if not isinstance(direction, Direction):
        raise UsageError(
            f"{type(intervention).__name__} has no direction that a random one could replace; pass controls=[…], "
            "interventions of the same kind with random vectors, or controls=0"
        )
    classes = [stage.prompts] * 2 if contrast is None else [contrast.positive, contrast.negative]
    x = [_read(stage.model, prompts, direction) for prompts in classes]
    drawn = control_directions(x[0], x[1], count=controls, norm=direction.norm, seed=stage.seed)
    return [Dial(stage, _with(intervention, torch.from_numpy(vector))) for vector in drawn]


def _read(model: LensModel, prompts: Sequence[Prompt], direction: Direction) -> np.ndarray:
    """Activations where the direction was read; at the prompt's end where prompts have no such token."""
    try:
        acts = capture(model, prompts, [direction.site], position=direction.position)
    except PositionError:
        acts = capture(model, prompts, [direction.site], position="prompt_end")
    return acts[:, 0].double().numpy()


def core(intervention: Any) -> Any:
    """What edits, inside conditions and parts."""
    while isinstance(intervention, Conditional | Partial):
        intervention = intervention.inner if isinstance(intervention, Partial) else intervention.intervention
    return intervention


def _with(intervention: Any, vector: Tensor) -> Any:
    """The same intervention along another vector."""
    if isinstance(intervention, Conditional):
        return replace(intervention, intervention=_with(intervention.intervention, vector))
    if isinstance(intervention, Partial):
        return replace(intervention, inner=_with(intervention.inner, vector))
    own: Direction = intervention.direction
    other = Direction(vector, own.site, position=own.position, name="random", provenance=own.provenance)
    return replace(intervention, direction=other)
