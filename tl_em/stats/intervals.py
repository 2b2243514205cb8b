"""Intervals of any statistic by resampling.  Means, rates and AUROC have files of their own.

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
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from tl_em.arguments import COUNT, SEED, checked
from tl_em.errors import UsageError
from tl_em.stats.estimate import Estimate, Resampled
from tl_em.stats.units import Groups, Units, as_counts, n_effective, units_of
from tl_em.threads import own_warnings

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
    low, high = np.quantile(drawn, tails(min(units.strata)))

    def at(value: float) -> float:
        beyond = float(min(np.sum(drawn <= value), np.sum(drawn >= value)))
        share = (1 + beyond) / (1 + len(drawn))
        if not beyond and drawn.std() > 0:  # farther than any draw: the tail of a normal of their spread
            share = min(share, float(scipy_stats.norm.sf(abs(value - point) / drawn.std())))
        return p_of_tail(share, min(units.strata))

    method = f"{method}, {resamples} draws, percentile"
    return Resampled(Estimate(point, float(low), float(high), n, worth, method, seed), at(0.0), at)


def _draw(statistic: Callable[..., np.ndarray], units: Units, *, seed: int, resamples: int) -> np.ndarray:
    """The bootstrap distribution, from scipy, with the drawn unit numbers turned into weights."""

    def of_draw(*drawn: np.ndarray, axis: int) -> np.ndarray:
        counts = [as_counts(d, size) for d, size in zip(drawn, units.strata, strict=True)]
        return statistic(*[counts[stratum][:, index] for stratum, index in units.members])

    with own_warnings():  # of draws without a value, as if of an interval that is not used
        warnings.simplefilter("ignore", scipy_stats.DegenerateDataWarning)
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


def tails(units: int, level: float = LEVEL) -> tuple[float, float]:
    """The percentile ends whose coverage is nominal for a mean of this many units (Hesterberg 2015)."""
    quantile = scipy_stats.t.ppf(0.5 - level / 2, units - 1) * math.sqrt(units / (units - 1))
    tail = float(scipy_stats.norm.cdf(quantile))
    return tail, 1 - tail


def p_of_tail(share: float, units: int) -> float:
    """Two-sided p of 0, where this share of the draws lies beyond it: the level at which :func:`tails` ends there.

    Args:
        share: of the draws on the side of 0 that has fewer.
        units: drawn.
    """
    quantile = scipy_stats.norm.ppf(min(share, 0.5)) / math.sqrt(units / (units - 1))
    return 2 * float(scipy_stats.t.cdf(quantile, units - 1))


def vector(values: ArrayLike) -> Float[np.ndarray, " prompt"]:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise UsageError(
            f"expected one finite number for each prompt, got shape {x.shape} with "
            f"{int(np.sum(~np.isfinite(x)))} not finite; a mean over them would be meaningless: check the metric"
        )
    return x
