"""Intervals and resampling: the only place where the prompt axis is reduced.

Everything that is estimated here is a function of *weighted means over prompts*, so one resampling scheme serves all of
it: draw the units (questions, or prompts when there are no questions) with replacement, turn the draw into integer
weights, and evaluate the statistic at those weights.  Prompts of one question always move together, because answers are
clustered by question: with intraclass correlation r and m prompts a question, n prompts are worth
``n / (1 + (m - 1) r)`` independent ones (Kish 1965, section 5.4).

Intervals are percentile intervals at the level that corrects their known narrowness in small samples
(Hesterberg 2015, arXiv:1411.5279, section 5.3.2), drawn by ``scipy.stats.bootstrap``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from tl_em.arguments import COUNT, SEED, checked
from tl_em.errors import UsageError
from tl_em.stats.estimate import Estimate, Resampled
from tl_em.stats.units import Groups, Units, as_counts, n_effective, units_of

RESAMPLES = 2000
LEVEL = 0.95


@checked(seed=SEED, resamples=COUNT)
def bootstrap(
    statistic: Callable[..., Float[np.ndarray, " resample"]],
    samples: Sequence[int | Groups],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Resampled:
    """Bootstrap a function of weighted means over one or several sets of prompts.

    Args:
        statistic: called with one array of non-negative weights ``[resample, prompt]`` for each sample; returns
            ``[resample]``.  It must give the point estimate at weights that are all 1.
        samples: for each sample its number of prompts, or one group label for each of its prompts.  Samples whose
            labels overlap are drawn jointly (the same questions in both classes); others independently.
        seed: seed of the draws.
        resamples: number of draws.

    Returns:
        The estimate and the two-sided bootstrap p of 0.  With fewer than two units the bounds and p are NaN.

    Example:
        >>> x = np.arange(10.0)
        >>> bootstrap(lambda w: w @ x / w.sum(-1), [10]).estimate
        4.50 [2.30, 6.50] n=10
    """
    units = units_of(samples)
    sizes = [len(index) for _, index in units.members]
    point = float(statistic(*[np.ones((1, n)) for n in sizes])[0])
    n, worth = sum(sizes), n_effective(samples, statistic, sizes)
    method = f"{'question-clustered ' if any(not isinstance(s, int) for s in samples) else ''}bootstrap"
    if min(units.strata) < 2:
        nan = float("nan")
        return Resampled(Estimate(point, nan, nan, n, worth, f"{method}: fewer than two units, no interval", seed), nan)
    drawn = _draw(statistic, units, seed=seed, resamples=resamples)
    low, high = np.quantile(drawn, _tails(min(units.strata)))
    below, above = np.sum(drawn <= 0), np.sum(drawn >= 0)
    p = min(1.0, 2 * (1 + min(below, above)) / (1 + len(drawn)))
    return Resampled(
        Estimate(point, float(low), float(high), n, worth, f"{method}, {resamples} draws, percentile", seed), float(p)
    )


def _draw(statistic: Callable[..., np.ndarray], units: Units, *, seed: int, resamples: int) -> np.ndarray:
    """The bootstrap distribution, from scipy, with the drawn unit numbers turned into weights."""

    def of_draw(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        counts = [as_counts(np.atleast_2d(d), size) for d, size in zip(drawn, units.strata, strict=True)]
        values = statistic(*[counts[stratum][:, index] for stratum, index in units.members])
        return values if drawn[0].ndim > 1 else values[0]

    result = scipy_stats.bootstrap(
        [np.arange(size) for size in units.strata],
        of_draw,
        n_resamples=resamples,
        batch=min(resamples, 250),
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    drawn = np.asarray(result.bootstrap_distribution)
    return drawn[np.isfinite(drawn)]


def _tails(units: int) -> tuple[float, float]:
    """The percentile ends whose coverage is nominal for a mean of this many units (Hesterberg 2015)."""
    quantile = scipy_stats.t.ppf(0.5 - LEVEL / 2, units - 1) * math.sqrt(units / (units - 1))
    tail = float(scipy_stats.norm.cdf(quantile))
    return tail, 1 - tail


@checked(seed=SEED)
def mean(values: ArrayLike, *, groups: Groups | None = None, seed: int = 0) -> Estimate:
    """Mean over prompts with its interval, clustered by ``groups`` when they are given.

    Args:
        values: one number a prompt.
        groups: the question that each prompt belongs to.
        seed: of the bootstrap.

    Example:
        >>> mean([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
        0.62 [0.25, 1.00] n=8
    """
    x = vector(values)
    return paired_difference(np.zeros_like(x), x, groups=groups, seed=seed).estimate


def mean_over_units(values: ArrayLike, units: Sequence[Hashable]) -> Estimate:
    """Mean over a few independent units (seeds, say), each counting once, with Student's t interval.

    A bootstrap of three or five units cannot leave the range that they span, and covers too little.

    Args:
        values: one for each row.
        units: the unit of each row; rows of one unit are averaged first.

    Example:
        >>> mean_over_units([0.1, 0.3, 0.5, 0.6, 0.8], [1, 1, 2, 3, 3])
        0.47 [-0.16, 1.09] n=3
    """
    from scipy.stats import t

    x, rows = vector(values), list(units)
    means = np.array([x[[i for i, unit in enumerate(rows) if unit == each]].mean() for each in dict.fromkeys(rows)])
    n, nan = len(means), float("nan")
    if n < 2:
        return Estimate(float(means[0]), nan, nan, n, float(n), "one unit, no interval")
    half = float(t.ppf(0.975, n - 1) * means.std(ddof=1) / np.sqrt(n))
    value = float(means.mean())
    return Estimate(value, value - half, value + half, n, float(n), f"Student's t over {n} units")


@checked(seed=SEED)
def paired_difference(before: ArrayLike, after: ArrayLike, *, groups: Groups | None = None, seed: int = 0) -> Resampled:
    """Mean of ``after - before``, prompt by prompt.

    Args:
        before, after: one number a prompt, the same prompts in both.
        groups: the question that each prompt belongs to.
        seed: of the bootstrap.

    Raises:
        UsageError: the two are not of one length, or hold NaN.

    Example:
        >>> paired_difference([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]).estimate.value
        1.0
    """
    first, second = vector(before), vector(after)
    if len(first) != len(second):
        raise UsageError(
            f"{len(first)} prompts before and {len(second)} after cannot be paired; measure both on the same prompts"
        )
    x = second - first
    return bootstrap(lambda w: w @ x / w.sum(-1), [len(x) if groups is None else groups], seed=seed)


@checked(seed=SEED)
def difference(
    first: ArrayLike, second: ArrayLike, *, groups: tuple[Groups, Groups] | None = None, seed: int = 0
) -> Resampled:
    """Mean of ``second`` minus mean of ``first``, for two unpaired sets of prompts.

    Args:
        first, second: one number a prompt, of each set.
        groups: the questions that the prompts of each set belong to.
        seed: of the bootstrap.

    Example:
        >>> difference([0.0, 1.0, 2.0], [5.0, 6.0]).estimate.value
        4.5
    """
    x, y = vector(first), vector(second)
    return bootstrap(lambda v, w: w @ y / w.sum(-1) - v @ x / v.sum(-1), list(groups or (len(x), len(y))), seed=seed)


def auroc(
    first: Float[np.ndarray, " prompt"],
    second: Float[np.ndarray, " other"],
    *,
    groups: Sequence[Groups] | None = None,
    pairs: Float[np.ndarray, "prompt other"] | None = None,
    seed: int = 0,
) -> Estimate:
    """Share of the pairs in which the first scores higher (Mann and Whitney's), with its interval.

    Args:
        first, second: a score for each prompt of either class.
        groups: the question of each prompt of either class; prompts of one question are resampled together.
        pairs: weight of each pair; 1 by default.
        seed: of the resampling.

    Example:
        >>> auroc(np.array([2.0, 3.0]), np.array([1.0, 2.5]), groups=("ab", "cd")).value
        0.75
    """
    above, each = share_above(first, second), np.ones((len(first), len(second))) if pairs is None else pairs

    def share(v: np.ndarray, w: np.ndarray) -> np.ndarray:
        total = ((v @ each) * w).sum(-1)
        return np.divide(((v @ (above * each)) * w).sum(-1), total, out=np.full(len(total), 0.5), where=total > 0)

    return bootstrap(share, list(groups or (len(first), len(second))), seed=seed).estimate


def share_above(first: np.ndarray, second: np.ndarray) -> Float[np.ndarray, "prompt other"]:
    """For each pair 1 where the first is higher, 1/2 where both are alike, else 0."""
    return (first[:, None] > second) + 0.5 * (first[:, None] == second)


def vector(values: ArrayLike) -> Float[np.ndarray, " prompt"]:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise UsageError(
            f"expected one finite number for each prompt, got shape {x.shape} with "
            f"{int(np.sum(~np.isfinite(x)))} not finite; a mean over them would be meaningless: check the metric"
        )
    return x
