"""Does the tuned model represent the same thing along another direction?

    rotation   1 - c_bt / sqrt(c_bb c_tt),   c_xy the product of the differences in means of x and y less what the
               prompts' own noise adds to it: 0 when nothing rotated, 1 at a right angle, however noisy the estimate is

The noise is the sum over units (questions, or prompts) of how far each moves the two differences, K / (K - 1) sum_k
e_xk . e_yk: a difference in means is longer than the truth by its own noise, so a plain cosine is too small (Spearman
1904).  A draw of the bootstrap is a sample like any other, and its own noise is taken off.  Units that both classes
share move both, so they are counted once.

**Control.**  A random direction has no re-extraction, so the control swaps base and tuned, unit by unit, after each
model's own mean has been removed: the rotation that exchangeable models would show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tl_em.claims.claim import NOT_SHOWN, RANDOM, Case, Finding, Planted, Question, Reading, Statistic, Weights, samples
from tl_em.directions.geometry import cosine
from tl_em.models.contrasts import ContrastSet

RESAMPLES = 1000


class Rotation(Question):
    """The question *rotation*: see the head of this file."""

    name, words, unit, smallest = "rotation", ("rotated", None), "cosine lost", 0.10
    asks = "Does the tuned model represent the same thing along another direction?"
    measured = (
        "Cosine of the direction extracted again from the tuned model with the base's, less what noise takes off it."
    )

    plain: ClassVar[Mapping[str, str]] = {
        "rotated": "The fine-tuned model now uses, in part, another pattern for what {direction} stood for.",
        NOT_SHOWN: "another pattern in its place",
    }

    def measure(self, case: Case) -> Finding:
        """How far the cosine falls below 1 once noise is taken off; the plain cosine and ratio of lengths beside it."""
        base, tuned = case.base, case.tuned
        turned = Turned.of(base, tuned, case.contrast)
        effect = case.bootstrap(turned.rotation, RESAMPLES)
        beyond = case.beyond_benign(
            lambda reading: (turned if reading is tuned else Turned.of(base, reading, case.contrast)).rotation,
            resamples=RESAMPLES,
        )
        beside = {"cosine": cosine_of_gaps(base, tuned), "norm ratio": _norm_ratio(base, tuned)}
        detail = {name: case.bootstrap(statistic, resamples=500).estimate for name, statistic in beside.items()}
        null, swaps = turned.swapped(case.n_controls, case.seed), "swaps of base and tuned"
        return case.finding(self, effect, controls=null, control=swaps, unit="of cosine", benign=beyond, detail=detail)

    def plant(self, case: Case, size: float, rng: np.random.Generator) -> Planted:
        """The difference in means turned towards a random direction.

        It is longer than the truth by its noise, which does not turn: so it turns by less.
        """
        difference = case.base.mean_difference
        square = difference @ difference
        noise = Turned.of(case.base, case.base, case.contrast).noise[0, 0].sum()
        cos = 1 - size * max(1 - noise / square, 0.0)
        aside = rng.choice(case.random[RANDOM])
        aside = aside - (aside @ difference) / square * difference
        sideways = np.sqrt((1 - cos**2) * square) * aside / np.linalg.norm(aside)
        turned = ((cos - 1) * difference + sideways) / 2
        return turned, -turned


class ClassInBoth(NamedTuple):
    """One class in both models: its prompts about their mean, the means, and the unit of each prompt."""

    x: Float[np.ndarray, "model prompt d_model"]
    means: Float[np.ndarray, "model d_model"]
    unit: Int[np.ndarray, " prompt"]

    def summed(self, size: int) -> Float[np.ndarray, "model unit d_model"]:
        """Sums over the prompts of each unit."""
        total = np.zeros((len(self.x), size, self.x.shape[-1]))
        for model, x in enumerate(self.x):
            np.add.at(total[model], self.unit, x)
        return total


@dataclass(frozen=True, eq=False)
class Turned:
    """A contrast in two models, as sums of products over units, from which each draw's rotation follows.

    Args:
        sides: the positive and the negative class.
        own: [class class model model unit] products of the units' residuals.
    """

    sides: tuple[ClassInBoth, ClassInBoth]
    own: Float[np.ndarray, "side side model model unit"]

    @classmethod
    def of(cls, base: Reading, tuned: Reading, contrast: ContrastSet) -> Turned:
        """Of both models' activations on a contrast set."""
        drawn = enumerate(samples(contrast))
        labels = [[(i, k) for k in range(s)] if isinstance(s, int) else list(s) for i, s in drawn]
        number = {label: k for k, label in enumerate(dict.fromkeys([*labels[0], *labels[1]]))}
        sides = []
        for each, x, y in zip(labels, (base.positive, base.negative), (tuned.positive, tuned.negative), strict=True):
            both = np.stack([x, y])
            means = both.mean(1)
            sides.append(ClassInBoth(both - means[:, None], means, np.array([number[label] for label in each])))
        sums = np.stack([side.summed(len(number)) for side in sides])
        return cls((sides[0], sides[1]), np.einsum("amkd,bnkd->abmnk", sums, sums))

    def rotation(self, v: Weights, w: Weights) -> Float[np.ndarray, " resample"]:
        """How far the cosine falls below 1, for every draw of weights of the positive and of the negative prompts."""
        totals = v.sum(-1, keepdims=True), w.sum(-1, keepdims=True)
        gaps = [
            (v @ self.sides[0].x[m]) / totals[0] - (w @ self.sides[1].x[m]) / totals[1]
            + self.sides[0].means[m] - self.sides[1].means[m] for m in (0, 1)
        ]  # fmt: skip
        counts = [self._by_unit(each, side) / total
                  for each, side, total in zip((v, w), self.sides, totals, strict=True)]  # fmt: skip
        counts[1] = -counts[1]
        units = np.sum([(count != 0) for count in counts], axis=0).astype(bool).sum(-1)

        def product(m: int, n: int) -> np.ndarray:
            noise = sum((counts[a] * counts[b]) @ self.own[a, b, m, n] for a in (0, 1) for b in (0, 1))
            return (gaps[m] * gaps[n]).sum(-1) - noise * units / np.maximum(units - 1, 1)

        return _lost(product(0, 0), product(1, 1), product(0, 1))

    @cached_property
    def noise(self) -> Float[np.ndarray, "model model unit"]:
        """What each unit adds by chance to the products of the models' differences in means."""
        signs = np.array([1, -1]) / np.array([len(side.unit) for side in self.sides])
        units = self.own.shape[-1]
        return np.einsum("a,b,abmnk->mnk", signs, signs, self.own) * units / max(units - 1, 1)

    def _by_unit(self, weights: Weights, side: ClassInBoth) -> Float[np.ndarray, "resample unit"]:
        """The weight of each unit: all of its prompts have the same."""
        found = np.zeros((len(weights), self.own.shape[-1]))
        found[:, side.unit] = weights
        return found

    def swapped(self, draws: int, seed: int) -> Float[np.ndarray, " control"]:
        """Rotation between models made exchangeable: each unit's base and tuned activations swapped with chance 1/2."""
        rng = np.random.default_rng(seed)
        swap = (rng.random((draws, self.own.shape[-1])) < 0.5).astype(float)
        middle = (self.sides[0].means + self.sides[1].means) / 2
        gaps = [0.0, 0.0]
        for sign, side in zip((1, -1), self.sides, strict=True):
            x = side.x + (side.means - middle)[:, None]
            moved = swap[:, side.unit] @ (x[1] - x[0]) / len(side.unit)
            gaps = [gaps[0] + sign * (x[0].mean(0) + moved), gaps[1] + sign * (x[1].mean(0) - moved)]

        def noise(m: int, n: int) -> np.ndarray:
            return (1 - swap) @ self.noise[m, n] + swap @ self.noise[1 - m, 1 - n]

        return _lost(*((np.sum(gaps[m] * gaps[n], axis=-1) - noise(m, n)) for m, n in ((0, 0), (1, 1), (0, 1))))


def _lost(bb: np.ndarray, tt: np.ndarray, bt: np.ndarray) -> np.ndarray:
    """1 less the cosine; where a length is all noise, nothing is known of it, which counts as a right angle."""
    known = (bb > 0) & (tt > 0)
    scale = np.sqrt(np.where(known, bb * tt, 1.0))
    return 1 - np.where(known, np.clip(bt / scale, -1, 1), 0.0)


def cosine_of_gaps(base: Reading, tuned: Reading) -> Statistic:
    """The cosine between the two models' differences in means."""
    return lambda v, w: cosine(base.gap(v, w), tuned.gap(v, w))


def _norm_ratio(base: Reading, tuned: Reading) -> Statistic:
    return lambda v, w: np.linalg.norm(tuned.gap(v, w), axis=-1) / np.linalg.norm(base.gap(v, w), axis=-1)
