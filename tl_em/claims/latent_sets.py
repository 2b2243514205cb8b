"""What is done to a set of latents, and the same done to what stands for it: measured, not yet judged.

    remove, no base   a' = 0                     placebos: 0
    remove            a' = base mean             placebos: their own base means
    induce            a' = tuned mean            placebos: their base means + the changes of the latents they stand for

The mean-difference direction is the difference of mean activations at the treated tokens: tuned less base or, without
a base, positive less negative prompts. Removed, its component is set to that of the base (the negative prompts).

Doses: a part of the treatment (0 to 1). The direction is brought to the same KL and not to the same dose, since any
vector changes a metric when it is long enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from tl_em.arguments import COUNT, NOT_NEGATIVE, POSITIVE, SEED, list_of, optional, settle
from tl_em.claims.arms import KL, Arm, Outcomes
from tl_em.claims.controls import NEAREST, matched_sets
from tl_em.claims.dose import Dial, Treated
from tl_em.claims.feature_check import DIRECTION, SET, ArmName
from tl_em.claims.questions.use import smallest_effect
from tl_em.dictionaries.dictionary import Dictionary, Feature
from tl_em.dictionaries.tokens import Seen, seen
from tl_em.directions.direction import Direction
from tl_em.errors import UsageError
from tl_em.interventions.base import Intervention, Partial
from tl_em.interventions.edits import Ablate, Add
from tl_em.interventions.latents import ScaleFeature
from tl_em.metrics import Behaviour, Metric
from tl_em.models.class_means import as_contrast
from tl_em.models.contrasts import ContrastSet, Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.stream import encoded_prompts
from tl_em.models.token_scopes import Where
from tl_em.stats import Estimate

CHECKS: dict[str, Any] = {"contrast": as_contrast, "placebos": COUNT, "doses": list_of(POSITIVE),
                          "smallest": optional(NOT_NEGATIVE), "seed": SEED}  # fmt: skip
MANY = 99
"""Rounds of placebos beside what would get a word beside the first ones."""
STRONGEST = 16.0
"""Largest coefficient at which the direction is added to reach the KL of a set of latents."""


def latents(features: Any) -> tuple[Feature, ...]:
    """One latent, several, or a FeatureSet, as a tuple of latents of one dictionary that can be set.

    Raises:
        UsageError: none, of several dictionaries, one twice, or of a transcoder.
    """
    found = getattr(features, "features", features)
    found = (found,) if isinstance(found, Feature) else tuple(found)
    if len({each.index for each in found}) < len(found):
        raise UsageError(f"latents {[each.index for each in found]} hold one twice; give each once")
    return ScaleFeature(found, 0.0).latents


class Trial(NamedTuple):
    """One treatment: what it did to every prompt, and what its placebos did on average.

    Args:
        arm: where.
        subject: the set, a latent, or the mean difference.
        outcomes: one number a prompt and metric, and the KL.
        controls: [placebo] effect on the behaviour; None for the mean difference.
        levels: for each metric [placebo] its mean over prompts; empty where only the behaviour was measured.
    """

    arm: Arm
    subject: str
    outcomes: Outcomes
    controls: Float[np.ndarray, " placebo"] | None = None
    levels: Mapping[str, Float[np.ndarray, " placebo"]] = {}

    @property
    def changes(self) -> dict[str, Estimate]:
        """The change of each metric but the first."""
        names = [name for name in self.arm.metrics if name != self.arm.first]
        return {name: self.arm.change(self.outcomes, name).estimate for name in names}


@dataclass(frozen=True, eq=False)
class Job:
    """What is asked of every set alike; as in ``verify_feature``."""

    model: LensModel
    contrast: ContrastSet
    metric: Metric | Behaviour
    placebos: int = 20
    against: LensModel | None = None
    good: Metric | None = None
    coherence: Metric | None = None
    fit: ContrastSet | None = None
    where: Where | None = None
    singly: bool = True
    doses: Sequence[float] = (0.25, 0.5, 1.0)
    smallest: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, **CHECKS)

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """``bad``, and ``good`` and ``coherence`` where they are measured."""
        given, found = self.metric, {"good": self.good, "coherence": self.coherence}
        if isinstance(given, Behaviour):
            given, found["good"] = given.metric, given.good if self.good is None else self.good
        return {"bad": given} | {name: each for name, each in found.items() if each is not None}

    @property
    def least(self) -> float:
        """The smallest effect of interest."""
        return smallest_effect(self.metrics["bad"], self.smallest)

    @property
    def known(self) -> ContrastSet:
        """The prompts that means, densities and the mean difference are taken from."""
        return self.fit or self.contrast

    @cached_property
    def scope(self) -> Where:
        """All tokens for an ablation; for a setting to means the answers, or the prompts' last tokens."""
        if self.where is not None or self.against is None:
            return self.where or "all"
        answered = all(prompt.response is not None for prompt in encoded_prompts(self.model, self.known.positive))
        return "generated" if answered else ("last", 1)

    @cached_property
    def arms(self) -> dict[ArmName, Arm]:
        """The latents removed from the model and, with a base, induced in that."""
        on: Any = {"prompts": self.contrast.positive, "groups": self.contrast.positive_groups, "metrics": self.metrics,
                   "where": self.scope, "seed": self.seed}  # fmt: skip
        arms: dict[ArmName, Arm] = {"remove": Arm("remove", self.model, sign=-1, **on).as_tokens()}
        return arms if self.against is None else {**arms, "induce": Arm("induce", self.against, **on).as_tokens()}

    @property
    def settings(self) -> dict[str, Any]:
        """What was treated how, for people."""
        return {
            "where": _said(self.scope), "metrics": {name: metric.name for name, metric in self.metrics.items()},
            "unit": self.metrics["bad"].unit, "to": "0" if self.against is None else "means of the base",
            "placebos": self.placebos, "seed": self.seed,
        }  # fmt: skip


def _said(where: Where) -> str:
    if isinstance(where, tuple):
        return "the prompts' last token" if where[1] == 1 else f"the prompts' last {where[1]} tokens"
    owners = {"all": "all", "prompt": "the prompts'", "generated": "the answers'", "instruction": "the instructions'"}
    return owners[where]


@dataclass(frozen=True, eq=False)
class LatentSet:
    """Latents that are treated together, with the means that they are set to and the placebos that stand for them.

    Args:
        job: what is asked.
        features: the latents.
        apart: further latents of the dictionary that may not stand for them.
    """

    job: Job
    features: tuple[Feature, ...]
    apart: tuple[int, ...]

    @property
    def dictionary(self) -> Dictionary:
        return self.features[0].dictionary

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(each.index for each in self.features)

    @property
    def label(self) -> str:
        """What is asked, for people."""
        named = ", ".join(map(str, self.indices[:6])) + (", …" if len(self.indices) > 6 else "")
        counted = f"latent {named}" if len(self.indices) == 1 else f"{len(self.indices)} latents ({named})"
        return f"{counted} of {self.dictionary.label} on {self.job.contrast.label or 'the contrast'}"

    # --- What they are set to, and what stands for them ---

    @cached_property
    def own(self) -> Seen:
        """In the model that is treated, on the prompts that show the behaviour."""
        return self._seen(self.job.model, self.job.known.positive)

    @cached_property
    def other(self) -> Seen:
        """In the base on the same prompts; without a base, in the model on the prompts that do not show it."""
        base, known = self.job.against, self.job.known
        return self._seen(self.job.model, known.negative) if base is None else self._seen(base, known.positive)

    def _seen(self, model: LensModel, prompts: Sequence[Prompt]) -> Seen:
        return seen(model, self.dictionary, prompts, where=self.job.scope)

    @cached_property
    def density(self) -> Float[torch.Tensor, " feature"]:
        return (self.own.density + self.other.density) / 2

    @cached_property
    def every(self) -> Int[np.ndarray, "placebo chosen"]:
        """All rounds of placebos: the first, and up to ``MANY``; for a single latent as many as are near."""
        others = len(set(range(self.dictionary.d_sae)) - {*self.indices, *self.apart})
        first, most = self.job.placebos, MANY if len(self.indices) > 1 else min(NEAREST, others)
        return matched_sets(
            self.dictionary, self.indices, self.density, count=max(first, most), once=first, without=self.apart,
            seed=self.job.seed,
        )  # fmt: skip

    @property
    def sets(self) -> Int[np.ndarray, "placebo chosen"]:
        """The rounds that a first look takes."""
        return self.every[: self.job.placebos]

    def edit(self, arm: ArmName, chosen: Sequence[int] | None = None) -> ScaleFeature:
        """The treatment of the set or of a part of it."""
        index = list(self.indices if chosen is None else chosen)
        features = [self.dictionary.feature(i) for i in index]
        if self.job.against is None:
            return ScaleFeature(features, 0.0)
        return ScaleFeature(features, to=(self.other if arm == "remove" else self.own).mean[index])

    def placebo_edit(self, arm: ArmName, row: Sequence[int]) -> ScaleFeature:
        """The same, of latents that stand for the set's."""
        if arm == "remove":
            return self.edit(arm, row)
        own = list(self.indices)
        to = self.other.mean[list(row)] + self.own.mean[own] - self.other.mean[own]
        return ScaleFeature([self.dictionary.feature(i) for i in row], to=to.clamp_min(0.0))

    def direction_edit(self, arm: ArmName) -> Ablate | Add:
        """The mean difference taken out around the other mean, or added."""
        direction = Direction(self.own.x - self.other.x, self.dictionary.site_in, name=DIRECTION)
        return Ablate(direction, around=self.other.x) if arm == "remove" else Add(direction)

    # --- What that does ---

    @cached_property
    def trials(self) -> dict[tuple[str, str], Trial]:
        """By arm and subject: the set with its placebos and the mean difference; each latent alone where removed."""
        found: list[Trial] = []
        for name, arm in self.job.arms.items():
            found.append(Trial(arm, SET, arm.treated(self.edit(name)), *self._placebos(arm, self.sets)))
            found.append(Trial(arm, DIRECTION, arm.treated(self.direction_edit(name))))
            if self.job.singly and name == "remove" and len(self.indices) > 1:
                beside = self._single_placebos(arm, self.sets)
                alone = [arm.treated(self.edit("remove", [i])) for i in self.indices]
                found += [Trial(arm, f"latent {i}", a, beside) for i, a in zip(self.indices, alone, strict=True)]
        return {(trial.arm.name, trial.subject): trial for trial in found}

    def beside(self, trials: Sequence[Trial], rounds: int) -> list[Trial]:
        """Trials of one arm, all of the set or all of single latents, beside so many rounds of placebos."""
        (one, *_), further = trials, self.every[self.job.placebos : rounds]
        if one.subject == SET:
            controls, levels = self._placebos(one.arm, further)
        else:
            controls, levels = self._single_placebos(one.arm, further), {}
        return [
            trial._replace(
                controls=np.append(np.asarray(trial.controls), controls),
                levels={outcome: np.append(trial.levels[outcome], more) for outcome, more in levels.items()},
            )
            for trial in trials
        ]

    def _placebos(
        self, arm: Arm, rows: Int[np.ndarray, "placebo chosen"]
    ) -> tuple[Float[np.ndarray, " placebo"], dict[str, Float[np.ndarray, " placebo"]]]:
        """The effect of each set of placebos, and the mean of every outcome."""
        name: ArmName = "induce" if arm.name == "induce" else "remove"
        done = arm.each([self.placebo_edit(name, row) for row in rows.tolist()], said="placebos")
        levels = {outcome: np.array([each[outcome].mean() for each in done]) for outcome in (*arm.metrics, KL)}
        return np.array([arm.shift(each) for each in done]), levels

    def _single_placebos(self, arm: Arm, rows: Int[np.ndarray, "placebo chosen"]) -> Float[np.ndarray, " placebo"]:
        """The largest effect of a single latent in each set of placebos."""
        once = np.unique(rows).tolist()
        alone = arm.each([self.edit("remove", [i]) for i in once], [arm.first], said="single placebos")
        shifts = {i: arm.shift(each) for i, each in zip(once, alone, strict=True)}
        return np.array([max(shifts[i] for i in row) for row in rows.tolist()])

    def doses(self) -> list[dict[str, Any]]:
        """The latents' treatment in parts, and the mean difference at the same KL, or as far as it goes: a row each."""
        rows = []
        for name, whole in self.job.arms.items():
            arm = replace(whole, metrics={key: metric for key, metric in whole.metrics.items() if key != "coherence"})
            scale = STRONGEST if name == "induce" else 1.0
            direction = self.direction_edit(name)
            dials = [Dial(arm, self.edit(name)), Dial(arm, _Ending(direction.at(scale) if scale > 1 else direction))]
            for dose in self.job.doses:
                found = dials[0].at(float(dose))
                other = dials[1].reaching(found.push, near=1 / scale)
                rows.append(_dose_row(arm, "latents", float(dose), found))
                rows.append(_dose_row(arm, "mean difference, at this KL", scale * other.strength, other))
        return rows


@dataclass(frozen=True, eq=False)
class _Ending(Intervention):
    """An intervention whose strength has an end: a part of it is carried out, and no more than all."""

    inner: Intervention

    @property
    def strongest(self) -> float:
        return 1.0

    def at(self, strength: float) -> Intervention:
        return Partial(self.inner, strength)


def _dose_row(arm: Arm, treatment: str, strength: float, found: Treated) -> dict[str, Any]:
    bad = arm.mean(found.found["bad"], "bad", level=True)
    row = {"arm": arm.name, "treatment": treatment, "strength": strength, "kl": arm.mean(found.found[KL]).value,
           "bad": bad.value, "low": bad.low, "high": bad.high}  # fmt: skip
    good = {"good": arm.mean(found.found["good"], "good", level=True).value} if "good" in arm.metrics else {}
    return row | good | {"n": bad.n, "note": found.note}
