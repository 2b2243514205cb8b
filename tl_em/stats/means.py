"""Means of outcomes and their differences: the only place, beside ``rates``, where an outcome's prompts are averaged.

    m = sum_k S_k / sum_k N_k        S_k, N_k: sum and number of the prompts of unit k (a question, or one prompt)
    se^2 = K / (K - 1) sum_k (S_k - m N_k)^2 / N^2

Student's *t*, and from eight units on what the resampled (m* - m) / se* show of skewness beside it: the wider end on
either side.  *t* alone covers too little where outcomes are skewed (log-normal, n = 32: .89), resampling alone where
tails are heavy.  The ends of the resampled are those of ``intervals.tails``, followed to twice *t*'s reach.  p is the
level at which the interval that is shown ends at 0.  Outcomes with a range, and rates, are estimated by ``rates``.

Sources: Hesterberg 2015, arXiv:1411.5279, sections 4 and 5; Hall 1988, Annals of Statistics 16 (studentising); Kish
1965, section 5.4 (clusters).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from tl_em.arguments import SEED, checked
from tl_em.errors import UsageError
from tl_em.stats.estimate import Estimate, Resampled
from tl_em.stats.intervals import p_of_tail, tails, vector
from tl_em.stats.rates import Bounds, binary, bounded_mean, paired_rates, two_rates
from tl_em.stats.units import Groups, as_counts, design_effect, units_of

RESAMPLES, BATCH = 2000, 250
FEWEST = 8
"""Units below which nothing can be learnt of the skewness."""
FARTHEST = 2
"""Times Student's reach beyond which the studentised bootstrap is not followed: where a few units are alike but for one
or two, a resample without these hardly varies, and its ratio says nothing."""


@checked(seed=SEED)
def mean(values: ArrayLike, *, groups: Groups | None = None, bounds: Bounds | None = None, seed: int = 0) -> Estimate:
    """Mean over prompts with its interval, clustered by ``groups`` when they are given.

    Args:
        values: one number a prompt.  Where all are 0 or 1, it is a rate, and has the exact interval of one.
        groups: the question that each prompt belongs to.
        bounds: the range of the outcome, (0, 1) for a probability: the interval stays in it, and never vanishes.
        seed: of the resampling.

    Example:
        >>> mean([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
        0.62 [0.24, 0.91] n=8
        >>> mean([0.0] * 60)
        0.00 [0.00, 0.06] n=60
    """
    x = vector(values)
    if bounds is None and not binary(x):
        return _contrast([x], [1], [groups], seed).estimate
    parts = _parts([x], [1], [groups])
    limits = bounds or (0.0, 1.0)
    _check_bounds(x, limits)
    units = parts.sizes[0]
    worth = len(x) if groups is None else len(x) / design_effect(x, groups)
    if units < 2 and len(x) > 1:
        return _none(float(x.mean()), len(x), worth)
    said = "" if units == len(x) else "question-clustered, "
    found = bounded_mean(x, float(parts.variances[0]), units, limits, worth=worth, method=said)
    if bounds is None or units < FEWEST or binary((x - bounds[0]) / (bounds[1] - bounds[0])):
        return found
    skewed = _contrast([x], [1], [groups], seed).estimate  # which the Beta's shape need not be
    low, high = max(float(bounds[0]), min(found.low, skewed.low)), min(float(bounds[1]), max(found.high, skewed.high))
    return replace(found, low=low, high=high, method=f"{found.method} and {skewed.method}", seed=seed)


def _check_bounds(x: np.ndarray, bounds: Bounds) -> None:
    low, high = bounds
    if not low < high or x.min() < low - 1e-6 or x.max() > high + 1e-6:
        raise UsageError(
            f"values from {x.min():g} to {x.max():g} do not lie in bounds={bounds}, so an interval within them would "
            "say nothing; pass the lowest and the highest value that the outcome can have, or no bounds"
        )


def mean_over_units(values: ArrayLike, units: Sequence[Hashable], *, bounds: Bounds | None = None) -> Estimate:
    """Mean over a few independent units (seeds, say), each counting once.

    Student's t interval; with ``bounds``, one that stays in them.  A bootstrap of three or five units cannot leave the
    range that they span, and covers too little.

    Args:
        values: one for each row.
        units: the unit of each row; rows of one unit are averaged first.
        bounds: the range of the outcome, (0, 1) for a rate.

    Example:
        >>> mean_over_units([0.1, 0.3, 0.5, 0.6, 0.8], [1, 1, 2, 3, 3])
        0.47 [-0.16, 1.09] n=3
        >>> mean_over_units([0.9, 0.95, 1.0], [1, 2, 3], bounds=(0, 1))
        0.95 [0.66, 1.00] n=3
    """
    x, rows = vector(values), list(units)
    means = np.array([x[[i for i, unit in enumerate(rows) if unit == each]].mean() for each in dict.fromkeys(rows)])
    n = len(means)
    if n < 2:
        return _none(float(means[0]), n, float(n), "one unit, no interval")
    variance = float(means.var(ddof=1)) / n
    if bounds is not None:
        _check_bounds(means, bounds)
        return bounded_mean(means, variance, n, bounds, worth=float(n), method=f"over {n} units, ")
    half = float(scipy_stats.t.ppf(0.975, n - 1) * np.sqrt(variance))
    value = float(means.mean())
    return Estimate(value, value - half, value + half, n, float(n), f"Student's t over {n} units")


@checked(seed=SEED)
def paired_difference(before: ArrayLike, after: ArrayLike, *, groups: Groups | None = None, seed: int = 0) -> Resampled:
    """Mean of ``after - before``, prompt by prompt.

    Args:
        before, after: one number a prompt, the same prompts in both.  Where all are 0 or 1, it is the change of a rate.
        groups: the question that each prompt belongs to.
        seed: of the resampling.

    Raises:
        UsageError: the two are not of one length, or hold NaN.

    Example:
        >>> paired_difference([0.0, 1.0, 2.5], [1.0, 2.0, 3.0]).estimate
        0.83 [0.12, 1.55] n=3
    """
    first, second = vector(before), vector(after)
    if len(first) != len(second):
        raise UsageError(
            f"{len(first)} prompts before and {len(second)} after cannot be paired; measure both on the same prompts"
        )
    if binary(first, second):
        return paired_rates(first, second, groups)
    return _contrast([second - first], [1], [groups], seed)


@checked(seed=SEED)
def difference(
    first: ArrayLike, second: ArrayLike, *, groups: tuple[Groups, Groups] | None = None, seed: int = 0
) -> Resampled:
    """Mean of ``second`` minus mean of ``first``, for two unpaired sets of prompts.

    Args:
        first, second: one number a prompt, of each set.  Where all are 0 or 1, it is a difference of rates.
        groups: the questions that the prompts of each set belong to; a question may stand in both.
        seed: of the resampling.

    Example:
        >>> difference([0.0, 1.0, 2.0], [5.0, 6.0]).estimate.value
        4.5
    """
    x, y = vector(first), vector(second)
    shared = groups is not None and bool(set(groups[0]) & set(groups[1]))
    if binary(x, y) and not shared:
        return two_rates(x, y, groups)
    return _contrast([x, y], [-1, 1], list(groups or (None, None)), seed)


class Parts(NamedTuple):
    """A sum of signed means by units.

    Args:
        value: the sum.
        sizes: units of each stratum.
        samples: of each stratum the places of its samples, in ``means``.
        means: signed, of each sample.
        products: of each stratum [unit, column]: for each of its samples the unit's sum about the sample's mean and its
            number of prompts, then the products of all of these.
    """

    value: float
    sizes: list[int]
    samples: list[list[int]]
    means: list[float]
    products: list[np.ndarray]

    def at(self, weights: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The sum, and [stratum resample] variances, where units of each stratum count so often: [resample, unit]."""
        total, variances = np.full(len(weights[0]), self.value), []
        for stratum, w in enumerate(weights):
            k, found, c = w.shape[1], w @ self.products[stratum], len(self.samples[stratum])
            parts, pairs = found[:, : 2 * c], found[:, 2 * c :].reshape(len(w), 2 * c, 2 * c)
            with np.errstate(invalid="ignore", divide="ignore"):
                moved, scale = parts[:, :c] / parts[:, c:], 1 / parts[:, c:]
                # sum_k w_k (sum_j (S_jk - moved_j N_jk) / N_j)^2
                factors = np.concatenate([scale, -moved * scale], axis=1)
                variances.append(k / (k - 1) * np.einsum("bi,bij,bj->b", factors, pairs, factors))
                total = total + moved.sum(1)
        return total, np.array(variances)

    @property
    def variances(self) -> np.ndarray:
        """[stratum] of the sum as it is, without the rounding that products bring."""
        found = []
        for chosen, columns in zip(self.samples, self.products, strict=True):
            c, k = len(chosen), len(columns)
            influence = (columns[:, :c] / columns[:, c : 2 * c].sum(0)).sum(1)
            found.append(k / max(k - 1, 1) * float((influence**2).sum()))
        return np.array(found)


def _parts(values: Sequence[np.ndarray], signs: Sequence[int], groups: Sequence[Groups | None]) -> Parts:
    units = units_of([len(x) if g is None else g for x, g in zip(values, groups, strict=True)])
    means = [sign * float(x.mean()) for x, sign in zip(values, signs, strict=True)]
    samples = [[j for j, (at, _) in enumerate(units.members) if at == stratum] for stratum in range(len(units.strata))]
    products = []
    for stratum, size in enumerate(units.strata):
        chosen = [(signs[j] * values[j] - means[j], units.members[j][1]) for j in samples[stratum]]
        sums = [np.bincount(index, x, size) for x, index in chosen]
        both = np.stack([*sums, *(np.bincount(index, minlength=size).astype(float) for _, index in chosen)], axis=1)
        products.append(np.concatenate([both, (both[:, :, None] * both[:, None]).reshape(size, -1)], axis=1))
    return Parts(sum(means), units.strata, samples, means, products)


def _contrast(
    values: Sequence[np.ndarray], signs: Sequence[int], groups: Sequence[Groups | None], seed: int
) -> Resampled:
    """A sum of signed means with its studentised interval."""
    parts = _parts(values, signs, groups)
    each = parts.variances
    value, n = parts.value, sum(map(len, values))
    worth = 0.0 + sum(
        len(x) if g is None else len(x) / design_effect(x, g) for x, g in zip(values, groups, strict=True)
    )
    said = "" if all(g is None for g in groups) else "question-clustered "
    if min(parts.sizes) < 2:
        return Resampled(_none(value, n, worth), float("nan"))
    error = float(np.sqrt(each.sum()))
    if error <= 1e-12 * max(np.abs(x).max() for x in values):
        method = f"{said}mean of an outcome that does not vary"
        alike = Estimate(value, value, value, n, worth, method, seed)
        return Resampled(alike, float(value == 0), lambda other: float(value == other))
    df, units = _degrees(each, parts.sizes), min(parts.sizes)
    reach = float(scipy_stats.t.ppf(0.975, df)) * error
    low, high, method = value - reach, value + reach, f"{said}Student's t"
    drawn = _studentised(parts, seed) if units >= FEWEST else np.zeros(0)
    if len(drawn):
        ends = np.quantile(drawn, tails(units))
        low = min(low, value - min(ends[1] * error, FARTHEST * reach))
        high = max(high, value + min(-ends[0] * error, FARTHEST * reach))
        method += f" and studentised bootstrap, {RESAMPLES} draws, the wider ends"

    def at(other: float) -> float:
        away = (value - other) / error
        p, least = (2 * float(scipy_stats.t.sf(abs(away) / k, df)) for k in (1, FARTHEST))
        if not len(drawn):
            return p
        extreme = float(np.sum(drawn >= away) if away > 0 else np.sum(drawn <= away))
        return max(p, min(least, p_of_tail(extreme / len(drawn), units)))

    return Resampled(Estimate(value, float(low), float(high), n, worth, method, seed), at(0.0), at)


def _studentised(parts: Parts, seed: int) -> np.ndarray:
    """(m* - m) / se* of resampled units, but for resamples that do not vary."""
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(0, RESAMPLES, BATCH):
        weights = [as_counts(rng.integers(0, size, (BATCH, size)), size) for size in parts.sizes]
        found, each = parts.at(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn.append((found - parts.value) / np.sqrt(np.maximum(each.sum(0), 0)))
    ratios = np.concatenate(drawn)
    return ratios[np.isfinite(ratios)]


def _degrees(variances: np.ndarray, sizes: Sequence[int]) -> float:
    """Welch and Satterthwaite's degrees of freedom over the strata."""
    return float(variances.sum()) ** 2 / float((variances**2 / (np.asarray(sizes) - 1)).sum())


def _none(value: float, n: int, worth: float | int, why: str = "fewer than two units, no interval") -> Estimate:
    nan = float("nan")
    return Estimate(value, nan, nan, n, float(worth), why)
