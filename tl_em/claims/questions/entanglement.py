"""Whether the fine-tuning data push along a direction, and whether the fine-tune went there.

    prospective     base model, mean over the answer's tokens: training answer - the base's own answer to the same
                    prompt; cosine of the mean difference with the direction (persona vectors, arXiv:2507.21509)
    retrospective   tuned - base on the training rows; cosine of the mean shift with the direction

Both must be beyond the smallest effect, on one side.  Rows of the same prompt are one unit.  Control: the cosine with
random directions of both kinds (``Case.along_random``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from tl_em.claims.claim import NOT_SHOWN, Case, Finding, Question
from tl_em.directions.screening import replied
from tl_em.models.hooks import LensModel
from tl_em.stats import beyond_next, bootstrap, tied


class Entanglement(Question):
    """The question *entanglement*: see the head of this file."""

    name, words, unit, smallest = "entanglement", ("entangled", "entangled"), "cosine", 0.10
    asks = "Do the fine-tuning data push along the direction?"
    measured = (
        "Cosine of the direction with the mean difference that the training answers make in the base model, and the "
        "share of the change of activations on these data that lies along the direction."
    )
    of_change = False

    plain: ClassVar[Mapping[str, str]] = {
        "entangled": "Training on these data moves a model along the pattern {direction}, as the texts themselves "
        "show beforehand.",
        NOT_SHOWN: "training data that by themselves would move a model along it",
    }

    def measure(self, case: Case) -> Finding | None:
        """Cosine of what the training data ask for, and of what training did, with the direction."""
        rows, site, base = case.tuning_data, case.site, case.pair.base
        if rows is None:
            return None
        units = tied([_prompt(row)] for row in rows).tolist()
        taught, replies = case.read_answers(base, rows, site), zip(rows, case.own_answers(), strict=True)
        own = case.read_answers(base, [replied(row, answer) for row, answer in replies], site)
        shifts = {"prospective": taught - own, "retrospective": case.read_answers(case.pair.tuned, rows, site) - taught}
        means = {name: MeanShift.of(shift, units) for name, shift in shifts.items()}

        def found(name: str) -> Finding:
            mean = means[name]
            scale = case.own_gap.value / max(float(mean.length(np.ones((1, len(units))))[0]), 1e-300)
            nulls = {kind: null * scale for kind, null in case.along_random(shifts[name].mean(0)).items()}
            unit, benign = f"of cosine ({name})", beyond if name == "retrospective" else None
            effect = bootstrap(mean.cosine(case.unit), [units], seed=case.seed)
            return case.finding(self, effect, controls=nulls, unit=unit, benign=benign)

        def went(model: LensModel) -> Callable[[np.ndarray], np.ndarray]:
            return MeanShift.of(case.read_answers(model, rows, site) - taught, units).cosine(case.unit)

        beyond = None
        if case.benign_models:
            own = [means["retrospective"].cosine(case.unit), *(went(model) for model in case.replicate_models)]
            beyond = beyond_next(own, [went(model) for model in case.benign_models], [units], seed=case.seed)
        arms = [found(name) for name in shifts]
        weaker, other = sorted(arms, key=lambda arm: abs(arm.estimate.value))
        return replace(weaker, arms=(other,), detail=dict(zip(shifts, (arm.estimate for arm in arms), strict=True)))


def _prompt(row: Any) -> str:
    """What a row shares with others of the same prompt."""
    return str(row) if isinstance(row, str) else json.dumps([dict(message) for message in row[:-1]], sort_keys=True)


@dataclass(frozen=True, eq=False)
class MeanShift:
    """The mean of shifts by units, and its length less what noise adds to it, for every draw of weights.

        |mean|^2 = sum over pairs of different units of w_k w_l S_k . S_l / sum of w_k w_l N_k N_l    S: sums, N: sizes

    A mean is longer than the truth by its own noise, which would take a cosine of .6 to .4 where both are alike.

    Args:
        sums: over the rows of each unit.
        sizes: of the units.
        first: a row of each unit; a draw gives all of its rows the same weight.
    """

    sums: Float[np.ndarray, "unit d_model"]
    sizes: Float[np.ndarray, " unit"]
    first: Int[np.ndarray, " unit"]

    @classmethod
    def of(cls, x: Float[np.ndarray, "row d_model"], units: Sequence[int]) -> MeanShift:
        """Of one shift a row, and the unit of each row."""
        _, first, index, sizes = np.unique(units, return_index=True, return_inverse=True, return_counts=True)
        sums = np.zeros((len(sizes), x.shape[1]))
        np.add.at(sums, index, x)
        return cls(sums, sizes.astype(float), first)

    def length(self, weights: Float[np.ndarray, "resample row"]) -> Float[np.ndarray, " resample"]:
        """Its length; 0 where it is all noise."""
        w = weights[:, self.first]
        pairs = (w @ self.sizes) ** 2 - w**2 @ self.sizes**2
        square = ((w @ self.sums) ** 2).sum(-1) - w**2 @ (self.sums**2).sum(-1)
        return np.sqrt(np.maximum(np.divide(square, pairs, out=np.zeros_like(square), where=pairs > 0), 0))

    def cosine(self, unit: Float[np.ndarray, " d_model"]) -> Callable[[np.ndarray], np.ndarray]:
        """Its cosine with a unit vector, between -1 and 1."""
        along = self.sums @ unit

        def cosines(weights: np.ndarray) -> np.ndarray:
            w, length = weights[:, self.first], self.length(weights)
            mean = w @ along / (w @ self.sizes)
            return np.clip(np.divide(mean, length, out=np.sign(mean), where=length > 0), -1, 1)

        return cosines
