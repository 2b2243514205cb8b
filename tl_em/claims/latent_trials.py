"""What is done to a set of latents, and the same done to what stands for it: measured, not yet judged.

    remove, no base   a' = 0                     placebos: 0
    remove            a' = base mean             placebos: their own base means
    induce            a' = tuned mean            placebos: their base means + the changes of the latents they stand for

The mean-difference direction is the difference of mean activations at the treated tokens: tuned less base or, without
a base, positive less negative prompts. Removed, its component is set to that of the base (the negative prompts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from tl_em.claims.latent_arms import Arm, ArmName, Outcomes, dose_response
from tl_em.claims.placebos import match, matched_sets
from tl_em.dictionaries import Dictionary, Feature
from tl_em.dictionaries.tokens import Seen, seen
from tl_em.directions.direction import Direction
from tl_em.errors import UsageError
from tl_em.interventions.edits import Ablate, Add
from tl_em.interventions.latents import ScaleFeature
from tl_em.metrics import Metric
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.scopes import Where
from tl_em.models.stream import encoded_prompts

SET, DIRECTION = "the set", "mean difference"


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
    controls: Float[np.ndarray, " placebo"] | None
    levels: Mapping[str, Float[np.ndarray, " placebo"]]


class Measured(NamedTuple):
    """All trials of one set, and what is known about it."""

    dictionary: Dictionary
    indices: tuple[int, ...]
    label: str
    trials: tuple[Trial, ...]
    doses: list[dict[str, Any]]
    match: Mapping[str, float]
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Job:
    """What is asked of every set alike; as in ``verify_feature``.

    Args:
        metrics: ``bad``, and ``good`` and ``coherence`` where they are measured.
    """

    model: LensModel
    base: LensModel | None
    contrast: ContrastSet
    fit: ContrastSet
    metrics: Mapping[str, Metric]
    where: Where
    placebos: int
    singly: bool
    doses: Sequence[float]
    seed: int

    def measure(self, features: Sequence[Feature], others: Sequence[Feature] = ()) -> Measured:
        """Remove and induce the set, each latent alone, the placebos (none of ``others``) and the mean difference."""
        dictionary = features[0].dictionary
        apart = tuple(each.index for each in others if each.dictionary.hash == dictionary.hash)
        set_ = _Set(self, dictionary, tuple(each.index for each in features), apart)
        arms = [self._arm("remove", self.model)]
        if self.base is not None:
            arms.append(self._arm("induce", self.base))
        trials, doses = [], []
        for arm in arms:
            trials += set_.trials(arm)
            doses += dose_response(arm, set_.edit(arm.name), set_.direction_edit(arm.name), doses=self.doses)
        known = match(set_.dictionary, set_.indices, set_.density, set_.sets)
        names = {name: metric.name for name, metric in self.metrics.items()}
        settings = {
            "site": str(set_.dictionary.site_in), "where": _said(self.where), "metrics": names,
            "unit": self.metrics["bad"].unit, "to": "0" if self.base is None else "means of the base",
            "placebos": self.placebos, "seed": self.seed,
        }  # fmt: skip
        label = f"{_counted(set_.indices)} of {set_.dictionary.label} on {self.contrast.label or 'the contrast'}"
        return Measured(set_.dictionary, set_.indices, label, tuple(trials), doses, known, settings)

    def _arm(self, name: ArmName, model: LensModel) -> Arm:
        prompts, groups = self.contrast.positive, self.contrast.positive_groups
        return Arm(name, model, prompts, groups, self.metrics, self.where, self.seed)


def usual_scope(model: LensModel, contrast: ContrastSet, base: LensModel | None) -> Where:
    """All tokens for an ablation; for a setting to means the answers, or the prompts' last tokens."""
    if base is None:
        return "all"
    answered = all(prompt.response is not None for prompt in encoded_prompts(model, contrast.positive))
    return "generated" if answered else ("last", 1)


def _said(where: Where) -> str:
    if isinstance(where, tuple):
        return "the prompts' last token" if where[1] == 1 else f"the prompts' last {where[1]} tokens"
    owners = {"all": "all", "prompt": "the prompts'", "generated": "the answers'", "instruction": "the instructions'"}
    return owners[where]


def _counted(indices: Sequence[int]) -> str:
    named = ", ".join(map(str, indices[:6])) + (", …" if len(indices) > 6 else "")
    return f"latent {named}" if len(indices) == 1 else f"{len(indices)} latents ({named})"


@dataclass(frozen=True, eq=False)
class _Set:
    """The latents, with the means that they are set to and the placebos that stand for them."""

    job: Job
    dictionary: Dictionary
    indices: tuple[int, ...]
    apart: tuple[int, ...]

    @cached_property
    def own(self) -> Seen:
        """In the model that is treated, on the prompts that show the behaviour."""
        return seen(self.job.model, self.dictionary, self.job.fit.positive, where=self.job.where)

    @cached_property
    def other(self) -> Seen:
        """In the base on the same prompts; without a base, in the model on the prompts that do not show it."""
        if self.job.base is not None:
            return seen(self.job.base, self.dictionary, self.job.fit.positive, where=self.job.where)
        return seen(self.job.model, self.dictionary, self.job.fit.negative, where=self.job.where)

    @property
    def density(self) -> Float[torch.Tensor, " feature"]:
        return (self.own.density + self.other.density) / 2

    @cached_property
    def sets(self) -> Int[np.ndarray, "placebo chosen"]:
        return matched_sets(
            self.dictionary, self.indices, self.density, count=self.job.placebos, without=self.apart, seed=self.job.seed
        )

    def edit(self, arm: ArmName, chosen: Sequence[int] | None = None) -> ScaleFeature:
        """The treatment of the set or of a part of it."""
        index = list(self.indices if chosen is None else chosen)
        features = [self.dictionary.feature(i) for i in index]
        if self.job.base is None:
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

    def trials(self, arm: Arm) -> list[Trial]:
        """The set with its placebos, the mean difference, and the latents one by one where they are removed."""
        bar = tqdm(self.sets.tolist(), desc=f"placebos: {arm.name}", unit="set", disable=None, leave=False)
        done = [arm.treated(self.placebo_edit(arm.name, row)) for row in bar]
        levels = {name: np.array([each[name].mean() for each in done]) for name in (*arm.metrics, "kl")}
        controls = np.array([arm.shift(each) for each in done])
        found = [
            Trial(arm, SET, arm.treated(self.edit(arm.name)), controls, levels),
            Trial(arm, DIRECTION, arm.treated(self.direction_edit(arm.name)), None, {}),
        ]
        alone = self.job.singly and arm.name == "remove" and len(self.indices) > 1
        return found + (self._singles(arm) if alone else [])

    def _singles(self, arm: Arm) -> list[Trial]:
        """Each latent alone, beside the largest effect of a single latent in each set of placebos."""
        once = tqdm(np.unique(self.sets).tolist(), desc="single placebos", unit="latent", disable=None, leave=False)
        shifts = {i: arm.shift(arm.treated(self.edit(arm.name, [i]), only="bad")) for i in once}
        largest = np.array([max(shifts[i] for i in row) for row in self.sets.tolist()])
        return [Trial(arm, f"latent {i}", arm.treated(self.edit(arm.name, [i])), largest, {}) for i in self.indices]
