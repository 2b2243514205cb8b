"""What a fine-tune did to a direction: level, separation and rotation, in units of the direction's own gap.

With p, n the projections of positive and negative prompts on the base's unit direction, means taken over prompts:

    own gap      g = mean p_base - mean n_base
    level        ((mean p_tuned - mean p_base) + (mean n_tuned - mean n_base)) / 2g
    separation   (gap_tuned - gap_base) / g
    rotation     sqrt(c_bb c_tt) - c_bt,   c_xy the mean cosine of the differences in means of x on one random half of
                 the prompts and of y on the other half: 0 when nothing rotated, however noisy the estimate is

Controls.  For level and separation: the same shift read along random directions from the base's pooled within-class
covariance, in units of the *real* direction's gap.  A random direction has no re-extraction, so the control for
rotation swaps base and tuned, prompt by prompt, after each model's own mean has been removed: the rotation that
exchangeable models would show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from tl_em.claims.rule import SMALLEST_EFFECT, Finding, Question
from tl_em.directions.direction import Direction
from tl_em.directions.geometry import control_directions, cosine, half_splits
from tl_em.errors import NoGapError
from tl_em.models.contrasts import ContrastSet
from tl_em.stats import Estimate, Groups, Resampled, bootstrap

Acts = Float[np.ndarray, "prompt d_model"]
Weights = Float[np.ndarray, "resample prompt"]
Statistic = Callable[[Weights, Weights], np.ndarray]
SPLITS = 10
CHUNK = 100
RANDOM = "random directions of the base's within-class covariance"
SWAPPED = "swaps of base and tuned"
OWN_GAPS = "own gaps"


@dataclass(frozen=True, eq=False)
class Reading:
    """Activations of both classes at one site, in one model."""

    positive: Acts
    negative: Float[np.ndarray, "other d_model"]

    def project(self, unit: Float[np.ndarray, " d_model"]) -> Projected:
        """Both classes projected on a unit vector."""
        return Projected(self.positive @ unit, self.negative @ unit)

    @property
    def gap(self) -> Float[np.ndarray, " d_model"]:
        """The difference in means."""
        return self.positive.mean(0) - self.negative.mean(0)


@dataclass(frozen=True, eq=False)
class Projected:
    """Projections of both classes, in one model."""

    positive: Float[np.ndarray, " prompt"]
    negative: Float[np.ndarray, " other"]

    def gap(self, v: Weights, w: Weights) -> Float[np.ndarray, " resample"]:
        """Weighted gap between the classes."""
        return weighted(v, self.positive) - weighted(w, self.negative)

    def balanced(self, v: Weights, w: Weights) -> Float[np.ndarray, " resample"]:
        """Weighted class-balanced mean."""
        return (weighted(v, self.positive) + weighted(w, self.negative)) / 2


def weighted(weights: Weights, x: Float[np.ndarray, " prompt"]) -> Float[np.ndarray, " resample"]:
    """Weighted mean over prompts, for every draw of weights."""
    return weights @ x / weights.sum(-1)


def samples(contrast: ContrastSet) -> list[int | Groups]:
    """What the bootstrap draws: the questions of each class, or its prompts where no questions are named."""
    classes = ((contrast.positive, contrast.positive_groups), (contrast.negative, contrast.negative_groups))
    return [len(prompts) if groups is None else list(groups) for prompts, groups in classes]


@dataclass(frozen=True, eq=False)
class Measured:
    """One direction, its contrast set, and the readings of the models at the direction's site."""

    name: str
    direction: Direction
    contrast: ContrastSet
    base: Reading
    tuned: Reading
    benign: Reading | None
    seed: int

    @property
    def unit(self) -> Float[np.ndarray, " d_model"]:
        """Unit vector of the direction."""
        return self.direction.unit.double().numpy()

    def bootstrap(self, statistic: Statistic, resamples: int = 2000) -> Resampled:
        """Resample the contrast set's questions."""
        return bootstrap(statistic, samples(self.contrast), seed=self.seed, resamples=resamples)

    def controls(self, count: int) -> Float[np.ndarray, "control d_model"]:
        """Unit control directions of the base's pooled within-class covariance."""
        return control_directions(self.base.positive, self.base.negative, count=count, norm=1.0, seed=self.seed)


def own_gap(measured: Measured) -> Estimate:
    """The base's gap along the direction, on its own contrast set.

    Raises:
        NoGapError: the interval includes 0; nothing can be measured in units of it.
    """
    gap = measured.bootstrap(measured.base.project(measured.unit).gap).estimate
    if not gap.low > 0:
        raise NoGapError(
            f"{measured.name} at {measured.direction.site}: the gap between its own classes in the base model is "
            f"{gap}, which is not above 0, so changes cannot be measured in units of it. Use more prompts, another "
            "site or position (em.candidate_directions), or a contrast set whose prompts end at the concept"
        )
    return gap


def changes(measured: Measured, *, controls: int) -> list[Finding]:
    """Level, separation and rotation of one direction.

    Raises:
        NoGapError: the direction does not separate its own contrast set in the base model.
    """
    gap = own_gap(measured)
    random = measured.controls(controls)
    return [_level(measured, gap, random), _separation(measured, gap, random), _rotation(measured, controls)]


def _level(m: Measured, gap: Estimate, random: np.ndarray) -> Finding:
    base, tuned = m.base.project(m.unit), m.tuned.project(m.unit)
    effect = m.bootstrap(lambda v, w: (tuned.balanced(v, w) - base.balanced(v, w)) / base.gap(v, w))
    shift = (m.tuned.positive - m.base.positive).mean(0) + (m.tuned.negative - m.base.negative).mean(0)
    classes = {
        "own gap": gap,
        "positive class": m.bootstrap(
            lambda v, w: weighted(v, tuned.positive - base.positive) / base.gap(v, w)
        ).estimate,
        "negative class": m.bootstrap(
            lambda v, w: weighted(w, tuned.negative - base.negative) / base.gap(v, w)
        ).estimate,
    }
    beyond = None
    if m.benign is not None:
        benign = m.benign.project(m.unit)
        beyond = m.bootstrap(lambda v, w: (tuned.balanced(v, w) - benign.balanced(v, w)) / base.gap(v, w)).estimate
    return _finding(m, "level", effect, random @ shift / 2 / gap.value, RANDOM, OWN_GAPS, beyond, classes)


def _separation(m: Measured, gap: Estimate, random: np.ndarray) -> Finding:
    base, tuned = m.base.project(m.unit), m.tuned.project(m.unit)
    effect = m.bootstrap(lambda v, w: (tuned.gap(v, w) - base.gap(v, w)) / base.gap(v, w))
    beyond = None
    if m.benign is not None:
        benign = m.benign.project(m.unit)
        beyond = m.bootstrap(lambda v, w: (tuned.gap(v, w) - benign.gap(v, w)) / base.gap(v, w)).estimate
    detail = {
        f"d' {name}": m.bootstrap(_dprime(projected), resamples=500).estimate
        for name, projected in (("base", base), ("tuned", tuned))
    }
    null = random @ (m.tuned.gap - m.base.gap) / gap.value
    return _finding(m, "separation", effect, null, RANDOM, OWN_GAPS, beyond, detail)


def _dprime(projected: Projected) -> Statistic:
    x, y = projected.positive, projected.negative

    def statistic(v: Weights, w: Weights) -> np.ndarray:
        spread = [weighted(u, z**2) - weighted(u, z) ** 2 for u, z in ((v, x), (w, y))]
        n, m = v.sum(-1), w.sum(-1)
        pooled = (n * spread[0] + m * spread[1]) / np.maximum(n + m - 2, 1)
        return projected.gap(v, w) / np.sqrt(np.maximum(pooled, 1e-24))

    return statistic


def _rotation(m: Measured, controls: int) -> Finding:
    halves = [
        half_splits(_labels(sample), splits=SPLITS, seed=m.seed + i) for i, sample in enumerate(samples(m.contrast))
    ]

    def drop(tuned: Reading) -> Statistic:
        return lambda v, w: rotation(m.base, tuned, v, w, halves)

    effect = m.bootstrap(drop(m.tuned), resamples=500)
    beyond = None
    if m.benign is not None:
        benign = m.benign
        beyond = m.bootstrap(lambda v, w: drop(m.tuned)(v, w) - drop(benign)(v, w), resamples=500).estimate
    detail = {
        "cosine": m.bootstrap(lambda v, w: _cosine(m.base, m.tuned, v, w), resamples=500).estimate,
        "norm ratio": m.bootstrap(lambda v, w: _norm_ratio(m.base, m.tuned, v, w), resamples=500).estimate,
    }
    return _finding(m, "rotation", effect, _swapped(m, halves, controls), SWAPPED, "of cosine", beyond, detail)


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


def _gap(model: Reading, v: Weights, w: Weights) -> Float[np.ndarray, "resample d_model"]:
    return v @ model.positive / v.sum(-1, keepdims=True) - w @ model.negative / w.sum(-1, keepdims=True)


def _cosine(base: Reading, tuned: Reading, v: Weights, w: Weights) -> np.ndarray:
    return cosine(_gap(base, v, w), _gap(tuned, v, w))


def _norm_ratio(base: Reading, tuned: Reading, v: Weights, w: Weights) -> np.ndarray:
    return np.linalg.norm(_gap(tuned, v, w), axis=-1) / np.linalg.norm(_gap(base, v, w), axis=-1)


def _swapped(m: Measured, halves: Sequence[np.ndarray], controls: int) -> Float[np.ndarray, " control"]:
    """Rotation between models made exchangeable: each prompt's base and tuned activations swapped with chance 1/2."""
    rng = np.random.default_rng(m.seed)
    centred = []
    for model in (m.base, m.tuned):
        middle = (model.positive.mean(0) + model.negative.mean(0)) / 2
        centred.append(Reading(model.positive - middle, model.negative - middle))
    found = []
    for start in range(0, controls, CHUNK):
        draws = min(CHUNK, controls - start)
        sizes = (len(m.base.positive), len(m.base.negative))
        swaps = [rng.random((draws, n)) < 0.5 for n in sizes]
        ones = [np.ones((draws, n)) for n in sizes]
        found.append(rotation(centred[0], centred[1], ones[0], ones[1], halves, swaps))
    return np.concatenate(found)


def _labels(sample: int | Groups) -> list:
    return list(range(sample)) if isinstance(sample, int) else list(sample)


def _finding(
    m: Measured,
    question: Question,
    effect: Resampled,
    null: np.ndarray,
    control: str,
    unit: str,
    benign: Estimate | None,
    detail: Mapping[str, Estimate],
) -> Finding:
    return Finding(
        question, m.name, m.direction.site, effect.estimate, effect.p, null, control, SMALLEST_EFFECT[question], unit,
        benign, detail,
    )  # fmt: skip


def layer_rows(m: Measured, *, controls: int) -> list[dict[str, object]]:
    """Rows of ``Comparison.by_layer`` for one direction at one site: each class, gap, d', cosine and level, by
    model."""
    random = m.controls(controls)
    models = {"base": m.base, "tuned": m.tuned} | ({} if m.benign is None else {"benign": m.benign})
    return [row for name, reading in models.items() for row in _model_rows(m, name, reading, random)]


def _model_rows(m: Measured, name: str, reading: Reading, random: np.ndarray) -> list[dict[str, object]]:
    own, base = reading.project(m.unit), m.base.project(m.unit)
    up, down = (
        random @ (reading.positive - m.base.positive).mean(0),
        random @ (reading.negative - m.base.negative).mean(0),
    )
    quantities: dict[str, tuple[Statistic, np.ndarray | None]] = {
        "projection_positive": (lambda v, w: weighted(v, own.positive), base.positive.mean() + up),
        "projection_negative": (lambda v, w: weighted(w, own.negative), base.negative.mean() + down),
        "gap": (own.gap, None),
        "dprime": (_dprime(own), None),
    }
    if name != "base":
        quantities["cosine"] = (lambda v, w: _cosine(m.base, reading, v, w), None)
        quantities["level"] = (
            lambda v, w: (own.balanced(v, w) - base.balanced(v, w)) / base.gap(v, w),
            (up + down) / 2 / float(m.base.gap @ m.unit),
        )
    return [_layer_row(m, quantity, name, *found) for quantity, found in quantities.items()]


def _layer_row(
    m: Measured, quantity: str, model: str, statistic: Statistic, null: np.ndarray | None
) -> dict[str, object]:
    estimate = m.bootstrap(statistic, resamples=300).estimate
    band = (np.nan, np.nan) if null is None or model == "base" else np.quantile(null, [0.025, 0.975])
    site = m.direction.site
    return {
        "direction": m.name, "layer": site.layer, "stream": site.stream, "quantity": quantity, "model": model,
        "value": estimate.value, "low": estimate.low, "high": estimate.high,
        "control_low": float(band[0]), "control_high": float(band[1]),
    }  # fmt: skip
