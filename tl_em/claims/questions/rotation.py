"""Does the tuned model represent the same thing along another direction?

    rotation   sqrt(c_bb c_tt) - c_bt,   c_xy the mean cosine of the differences in means of x on one random half of the
               prompts and of y on the other half: 0 when nothing rotated, however noisy the estimate is

**Control.**  A random direction has no re-extraction, so the control swaps base and tuned, prompt by prompt, after each
model's own mean has been removed: the rotation that exchangeable models would show.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from tl_em.claims.claim import Case, Finding, Question, Reading, Statistic, Weights, samples
from tl_em.directions.geometry import cosine
from tl_em.stats import half_splits

SPLITS = 10
CHUNK = 100


class Rotation(Question):
    """The question *rotation*: see the head of this file."""

    name, words, unit, smallest = "rotation", ("rotated", None), "cosine lost", 0.10
    asks = "Does the tuned model represent the same thing along another direction?"
    measured = (
        "Cosine of the direction extracted again from the tuned model with the base's, against the cosine that two "
        "halves of the same data reach."
    )

    def measure(self, case: Case) -> Finding:
        """How far the cosine falls below its ceiling; cosine and ratio of lengths beside it."""
        base, tuned, benign = case.base, case.tuned, case.benign
        halves = [
            half_splits(list(range(sample)) if isinstance(sample, int) else list(sample), splits=SPLITS,
                        seed=case.seed + i)
            for i, sample in enumerate(samples(case.contrast))
        ]  # fmt: skip

        def drop(other: Reading) -> Statistic:
            return lambda v, w: rotation(base, other, v, w, halves)

        effect = case.bootstrap(drop(tuned), resamples=500)
        beyond = None
        if benign is not None:
            beyond = case.bootstrap(lambda v, w: drop(tuned)(v, w) - drop(benign)(v, w), resamples=500).estimate
        beside = {"cosine": cosine_of_gaps(base, tuned), "norm ratio": _norm_ratio(base, tuned)}
        detail = {name: case.bootstrap(statistic, resamples=500).estimate for name, statistic in beside.items()}
        null, swaps = _swapped(case, halves), "swaps of base and tuned"
        return case.finding(
            self, effect, controls=null, control=swaps, unit="of cosine", benign=beyond, detail=detail
        )


def rotation(
    base: Reading,
    tuned: Reading,
    v: Weights,
    w: Weights,
    halves: Sequence[Float[np.ndarray, "split prompt"]],
    swaps: Sequence[Bool[np.ndarray, "resample prompt"]] | None = None,
) -> Float[np.ndarray, " resample"]:
    """How far the cosine between base and tuned falls below the ceiling that noise alone sets: 0 without rotation.

    Args:
        base, tuned: activations of the same prompts in two models.
        v, w: weights of the positive and the negative prompts.
        halves: random halves of the positive and of the negative prompts, as 0/1 masks; the other half is the rest.
        swaps: for each draw, the positive and the negative prompts whose base and tuned activations change places.
    """
    draws, splits = len(v), len(halves[0])

    def gap(own: Reading, other: Reading, second: bool) -> np.ndarray:
        means = []
        for i, (weights, x, y) in enumerate(((v, own.positive, other.positive), (w, own.negative, other.negative))):
            half = 1 - halves[i] if second else halves[i]
            each = (weights[:, None] * half[None]).reshape(draws * splits, -1)
            total = each.sum(-1, keepdims=True)
            if swaps is not None:
                moved = each * np.repeat(swaps[i], splits, axis=0)
                summed = (each - moved) @ x + moved @ y
            else:
                summed = each @ x
            # A draw may leave a half without a prompt of a class: that split says nothing about that draw.
            means.append(np.divide(summed, total, out=np.full_like(summed, np.nan), where=total > 0))
        return means[0] - means[1]

    first = [gap(base, tuned, False), gap(tuned, base, False)]
    second = [gap(base, tuned, True), gap(tuned, base, True)]
    pairs = [cosine(first[0], second[0]), cosine(first[1], second[1])]
    pairs.append((cosine(first[0], second[1]) + cosine(first[1], second[0])) / 2)
    found = np.ma.masked_invalid(np.stack(pairs).reshape(3, draws, splits)).mean(-1)
    own_base, own_tuned, across = found.filled(0.0)
    return np.sqrt(np.maximum(own_base, 0) * np.maximum(own_tuned, 0)) - across


def cosine_of_gaps(base: Reading, tuned: Reading) -> Statistic:
    """The cosine between the two models' differences in means."""
    return lambda v, w: cosine(base.gap(v, w), tuned.gap(v, w))


def _norm_ratio(base: Reading, tuned: Reading) -> Statistic:
    return lambda v, w: (
        np.linalg.norm(tuned.gap(v, w), axis=-1) / np.linalg.norm(base.gap(v, w), axis=-1)
    )


def _swapped(case: Case, halves: Sequence[np.ndarray]) -> Float[np.ndarray, " control"]:
    """Rotation between models made exchangeable: each prompt's base and tuned activations swapped with chance 1/2."""
    rng = np.random.default_rng(case.seed)
    centred = []
    for model in (case.base, case.tuned):
        middle = (model.positive.mean(0) + model.negative.mean(0)) / 2
        centred.append(Reading(model.positive - middle, model.negative - middle))
    found = []
    for start in range(0, case.n_controls, CHUNK):
        draws = min(CHUNK, case.n_controls - start)
        sizes = (len(case.base.positive), len(case.base.negative))
        swaps = [rng.random((draws, n)) < 0.5 for n in sizes]
        ones = [np.ones((draws, n)) for n in sizes]
        found.append(rotation(centred[0], centred[1], ones[0], ones[1], halves, swaps))
    return np.concatenate(found)
