"""One arm of a verification: a model, its prompts, what is measured on them, and treatments at the tokens of a scope.

    effect = untreated - treated where latents are removed, treated - untreated where they are induced

Every treatment is measured on all prompts, one number a prompt: the behaviour, the KL from the untreated model at the
last token and, where there are any, the good behaviour and the coherence.

Doses: a part of the treatment (0 to 1). Another treatment is brought to the same KL and not to the same dose, since any
vector changes a metric when it is long enough.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_em.claims.treatments import Dial, Stage, Treated
from tl_em.interventions.edits import Add
from tl_em.interventions.intervene import intervene
from tl_em.interventions.many import kl_from_now
from tl_em.interventions.wrappers import AtTokens
from tl_em.metrics import Metric
from tl_em.models.hooks import LensModel
from tl_em.models.scopes import Where
from tl_em.models.stream import encoded_prompts
from tl_em.stats import Estimate, Resampled, mean, paired_difference

ArmName = Literal["remove", "induce"]
Outcomes = Mapping[str, Float[np.ndarray, " prompt"]]
STRONGEST = 16.0
"""Largest coefficient at which a direction is added to reach the KL of a set of latents."""


@dataclass(frozen=True, eq=False)
class Arm:
    """A model with its prompts, and the sign that the claim predicts.

    Args:
        name: ``"remove"``: the behaviour should fall; ``"induce"``: it should rise.
        model: the model that is treated; hooks on it belong to both sides of the comparison.
        prompts: what is measured on.
        groups: the question that each prompt belongs to.
        metrics: ``bad``, and ``good`` and ``coherence`` where they are measured.
        where: the tokens that are treated.
        seed: of the resampling.
    """

    name: ArmName
    model: LensModel
    prompts: Sequence[Any]
    groups: Sequence[Hashable] | None
    metrics: Mapping[str, Metric]
    where: Where
    seed: int

    @cached_property
    def untreated(self) -> Outcomes:
        """Every metric of the model as it is."""
        return self._all(self.prompts)

    def _all(self, prompts: Sequence[Any]) -> Outcomes:
        return {name: _numbers(metric(self.model, prompts)) for name, metric in self.metrics.items()}

    @cached_property
    def read(self) -> Sequence[Any]:
        """The prompts as tokens, once for all treatments, where every metric reads those as it reads the prompts."""
        encoded = encoded_prompts(self.model, self.prompts)
        try:
            again = self._all(encoded)
        except Exception:  # a metric of the user's own may want text, and fail in any way
            return self.prompts
        same = all(np.allclose(again[name], values, atol=1e-6) for name, values in self.untreated.items())
        return encoded if same else self.prompts

    @cached_property
    def _kl(self) -> Any:
        return kl_from_now(self.model, self.read)

    def treated(self, intervention: Any, *, only: str | None = None) -> Outcomes:
        """Every metric, or one of them, and the KL (``kl``) under an intervention."""
        measures, prompts = {**self.metrics, "kl": self._kl}, self.read  # made before the model is treated
        wanted = measures if only is None else {only: measures[only]}
        with intervene(self.model, intervention, where=self.where):
            return {name: _numbers(measure(self.model, prompts)) for name, measure in wanted.items()}

    def change(self, treated: Outcomes, outcome: str = "bad") -> Resampled:
        """Paired change of an outcome; of ``bad`` in the direction that the claim predicts."""
        sign = -1.0 if self.name == "remove" and outcome == "bad" else 1.0
        return paired_difference(
            sign * self.untreated[outcome], sign * treated[outcome], groups=self.groups, seed=self.seed
        )

    def shift(self, treated: Outcomes) -> float:
        """The effect on ``bad`` without its interval."""
        return float((treated["bad"] - self.untreated["bad"]).mean()) * (-1 if self.name == "remove" else 1)

    def mean(self, values: Float[np.ndarray, " prompt"]) -> Estimate:
        """Mean over prompts with its interval."""
        return mean(values, groups=self.groups, seed=self.seed)


def _numbers(values: Tensor) -> Float[np.ndarray, " prompt"]:
    return values.double().cpu().numpy()


def dose_response(arm: Arm, latents: Any, direction: Any, *, doses: Sequence[float]) -> list[dict[str, Any]]:
    """The latents' treatment in parts, and the direction's at the same KL: one row each.

    Args:
        arm: where.
        latents: the whole treatment of the latents.
        direction: an ``Ablate`` or ``Add``; it is brought to the KL of each dose, or taken as far as it goes.
        doses: parts of the whole, from 0 to 1.
    """
    if not doses:
        return []
    good = (arm.metrics["good"], arm.prompts) if "good" in arm.metrics else None
    stage = Stage(arm.model, arm.prompts, arm.metrics["bad"], good, arm.groups, arm.seed)
    scale = STRONGEST if isinstance(direction, Add) else 1.0
    whole = replace(direction, coefficient=scale * direction.coefficient) if isinstance(direction, Add) else direction
    dials = [Dial(stage, AtTokens(each, arm.where)) for each in (latents, whole)]
    rows, near = [], 1.0 / scale
    for dose in doses:
        found = dials[0].at(float(dose))
        other = dials[1].reaching(float(found.kl.mean()), near=near)
        rows.append(_row(arm, stage, "latents", float(dose), found))
        rows.append(_row(arm, stage, "mean difference, at this KL", scale * other.strength, other))
    return rows


def _row(arm: Arm, stage: Stage, treatment: str, strength: float, found: Treated) -> dict[str, Any]:
    bad, kl = stage.mean(found.effect), stage.mean(found.kl)
    row = {"arm": arm.name, "treatment": treatment, "strength": strength, "kl": kl.value, "bad": bad.value,
           "low": bad.low, "high": bad.high}  # fmt: skip
    good = None if found.coherence is None else stage.mean(found.coherence).value
    return row | ({} if good is None else {"good": good}) | {"n": bad.n, "note": found.note}
