"""One arm of an experiment: a model, its prompts, what is measured on them, and the sign that the claim predicts.

    change = sign * (treated - untreated), prompt by prompt

A treatment is an intervention at the tokens of a scope.  Many of one kind run in one batch, and a sample of them is
checked against one by one (``interventions.many``).  Beside what is measured stands the push: KL(untreated ||
treated) of the next token at the prompt's end, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_em.interventions.base import Intervention
from tl_em.interventions.intervene import intervene
from tl_em.interventions.many import Along, Measure, along_each, kl_from_now
from tl_em.metrics import Metric, measured, range_of
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.sites import Site
from tl_em.models.stream import encoded_prompts
from tl_em.models.token_scopes import Where
from tl_em.stats import Estimate, Resampled, mean, paired_difference

Values = Float[np.ndarray, " prompt"]
Outcomes = Mapping[str, Values]
KL = "kl"


@dataclass(frozen=True, eq=False)
class Arm:
    """A model with its prompts, and what is measured on them.

    Args:
        name: what is done in it, for people.
        model: the model that is treated; hooks on it belong to both sides of the comparison.
        prompts: what is measured on.
        groups: the question that each prompt belongs to.
        metrics: what is measured, by name; the claim is about the first.
        sign: +1 where the first metric should rise, -1 where it should fall.
        where: the tokens that are treated.
        seed: of the resampling.
        apart: for metrics that are measured on prompts of their own, those.
    """

    name: str
    model: LensModel
    prompts: Sequence[Any]
    groups: Sequence[Hashable] | None
    metrics: Mapping[str, Metric]
    sign: int = 1
    where: Where = "all"
    seed: int = 0
    apart: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @cached_property
    def untreated(self) -> Outcomes:
        """Every metric of the model as it is."""
        return {name: measured(metric, self.model, self._on(name)) for name, metric in self.metrics.items()}

    @cached_property
    def kl(self) -> Measure:
        """KL of each prompt from the model as it is when this is first asked for."""
        return kl_from_now(self.model, self._encoded)

    @cached_property
    def _encoded(self) -> list[EncodedPrompt]:
        return encode(self.model, self.prompts)

    def treated(self, intervention: Intervention | Any, only: Sequence[str] = ()) -> Outcomes:
        """Every metric and the KL (``kl``), or only some of them, under an intervention."""
        measures: dict[str, Any] = {name: self._measure(name) for name in only or (*self.metrics, KL)}  # untreated yet
        with intervene(self.model, intervention, where=self.where):
            return {name: numbers(measure(self.model, self._on(name))) for name, measure in measures.items()}

    def each(self, interventions: Iterable[Any], only: Sequence[str] = (), *, said: str) -> list[Outcomes]:
        """:meth:`treated` for one intervention after another, with a progress bar."""
        bar = tqdm(list(interventions), desc=f"{self.name}: {said}", disable=None, leave=False)
        return [self.treated(each, only) for each in bar]

    def along(
        self,
        template: Intervention,
        vectors: Float[Tensor, "direction d_model"],
        outcome: str,
        sites: Sequence[Site] = (),
    ) -> Float[np.ndarray, "direction prompt"]:
        """One metric under an intervention along each of many directions, each at its site where they differ."""
        edits, said = Along(template, vectors, sites), f"{self.name}: {self.metrics[outcome].name}"
        return along_each(self.model, edits, self.prompts, self._measure(outcome), at_once=1, said=said)

    def change(self, treated: Outcomes, outcome: str = "") -> Resampled:
        """Paired change of an outcome; of the first in the direction that the claim predicts."""
        name = outcome or self.first
        sign = self.sign if name == self.first else 1
        before, after = sign * self.untreated[name], sign * treated[name]
        return paired_difference(before, after, groups=self._groups(name), seed=self.seed)

    def shift(self, treated: Outcomes) -> float:
        """The effect on the first metric without its interval."""
        return self.sign * float((treated[self.first] - self.untreated[self.first]).mean())

    def mean(self, values: Values, outcome: str = "", *, level: bool = False) -> Estimate:
        """Mean over prompts with its interval, of an outcome's level within its range; NaN if a value is."""
        if not np.isfinite(values).all():
            return self._same(float("nan"), len(values), "not measured")
        if outcome == KL and not values.any():  # in nats: no rate, of which 0 of n leaves room for more
            return self._same(0.0, len(values), "0 at every prompt")
        metric = self.metrics.get(outcome) if level else None
        bounds = None if metric is None else range_of(metric.unit, values)
        return mean(values, groups=self._groups(outcome), bounds=bounds, seed=self.seed)

    def paired(self, before: Values, after: Values, outcome: str) -> Estimate:
        """Mean of ``after - before``, of a metric's values on the same prompts; NaN if a value is."""
        if before is after:
            return self._same(0.0, len(after), "0 by construction")
        if not np.isfinite(after - before).all():
            return self._same(float("nan"), len(after), "not measured")
        return paired_difference(before, after, groups=self._groups(outcome), seed=self.seed).estimate

    def _same(self, value: float, n: int, why: str) -> Estimate:
        return Estimate(value, value, value, n=n, n_effective=value if math.isnan(value) else float(n), method=why,
                        seed=self.seed)  # fmt: skip

    @property
    def nothing(self) -> Outcomes:
        """NaN for every metric and the KL."""
        return {name: np.full(len(self._on(name)), np.nan) for name in (*self.metrics, KL)}

    @property
    def first(self) -> str:
        """Name of the metric that the claim is about."""
        return next(iter(self.metrics))

    def some(self, index: Int[np.ndarray, " prompt"]) -> Arm:
        """The same arm on some of its prompts, without their groups."""
        return replace(self, prompts=[self.prompts[i] for i in index], groups=None)

    def as_tokens(self) -> Arm:
        """The same arm with its prompts as tokens, once for all treatments, if every metric reads those as the text."""
        encoded = replace(self, prompts=encoded_prompts(self.model, self.prompts))
        try:
            again = encoded.untreated
        except Exception:  # a metric of the user's own may want text, and fail in any way
            return self
        same = all(np.allclose(again[name], values, atol=1e-6) for name, values in self.untreated.items())
        return encoded if same else self

    def _measure(self, name: str) -> Metric | Measure:
        return self.kl if name == KL else self.metrics[name]

    def _on(self, name: str) -> Sequence[Any]:
        return self._encoded if name == KL else self.apart.get(name, self.prompts)

    def _groups(self, name: str) -> Sequence[Hashable] | None:
        return None if name in self.apart else self.groups


def numbers(values: Tensor) -> Values:
    """As float64 on the CPU."""
    return values.double().cpu().numpy()
