"""Rates and other outcomes with a range: intervals that cannot leave the range, and have a width at 0 of n.

    one rate        Clopper and Pearson's exact interval, from Beta quantiles
    clusters, and   the same with the number of answers that would give the variance seen, m (1 - m) / var, less those
    probabilities   that its few units cost, times (z / t)^2 (Korn & Graubard 1998, Survey Methodology 24)
    paired rates    one answer of either kind added to the changes, then normal (Bonett & Price 2012, JEBS 37)
    two rates       one answer of either kind added to each set, then normal (Agresti & Caffo 2000)

A cluster's answers count for as many as its design effect leaves (``units.design_effect``).  Where every answer is the
same, the variance of the units cannot be seen: then each unit counts once.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats as scipy_stats

from tl_em.stats.estimate import Estimate, Resampled
from tl_em.stats.units import Groups, design_effect

Bounds = tuple[float | int, float | int]
Z = float(scipy_stats.norm.ppf(0.975))


def binary(*samples: np.ndarray) -> bool:
    """Whether all values are 0 or 1."""
    return all(np.isin(x, (0.0, 1.0)).all() for x in samples)


def beta_interval(hits: float | int, n: float | int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % interval of a rate; neither number need be whole.

    Args:
        hits: how many of them.
        n: answers.

    Example:
        >>> low, high = beta_interval(0, 60)
        >>> low, round(high, 3)
        (0.0, 0.06)
    """
    low = 0.0 if hits <= 0 else float(scipy_stats.beta.ppf(0.025, hits, n - hits + 1))
    high = 1.0 if hits >= n else float(scipy_stats.beta.ppf(0.975, hits + 1, n - hits))
    return low, high


def bounded_mean(
    x: np.ndarray, variance: float, units: int, bounds: Bounds, *, worth: float | int, method: str = ""
) -> Estimate:
    """Mean of an outcome with a range.

    Args:
        x: one number a prompt.
        variance: of the mean.
        units: independent ones; an interval is had from two on.
        bounds: of the outcome.
        worth: what the prompts are worth as independent ones.
        method: how clusters were taken into account, in words.
    """
    low, high = bounds
    m = (float(x.mean()) - low) / (high - low)
    exact = units == len(x) and binary((x - low) / (high - low))
    most = m * (1 - m) * (high - low) ** 2
    if exact:
        n, said = float(len(x)), "exact (Clopper and Pearson)"
    elif variance > 1e-12 * most and most > 0:
        n = most / variance * (Z / float(scipy_stats.t.ppf(0.975, units - 1))) ** 2
        said = "Clopper and Pearson's at the variance seen (Korn and Graubard)"
    else:
        n, said = float(units), "Clopper and Pearson's, every unit once"
    ends = [low + (high - low) * end for end in beta_interval(m * n, n)]
    return Estimate(float(x.mean()), ends[0], ends[1], len(x), float(worth), method + said)


def paired_rates(before: np.ndarray, after: np.ndarray, groups: Groups | None) -> Resampled:
    """Change of a rate on the same prompts (Bonett and Price)."""
    n, change = len(before), after - before
    worth = n / (1.0 if groups is None else design_effect(change, groups))
    up, down = ((np.mean(change == sign) * worth + 1) / (worth + 2) for sign in (1, -1))
    error = math.sqrt(max(up + down - (up - down) ** 2, 0) / (worth + 2))
    return _normal(float(change.mean()), up - down, error, n, worth, "Bonett and Price's adjusted interval")


def two_rates(first: np.ndarray, second: np.ndarray, groups: tuple[Groups, Groups] | None) -> Resampled:
    """Difference of the rates of two sets of prompts (Agresti and Caffo)."""
    sets = (first, second)
    worth = [len(x) / (1.0 if groups is None else design_effect(x, groups[i])) for i, x in enumerate(sets)]
    p, q = ((x.mean() * n + 1) / (n + 2) for x, n in zip(sets, worth, strict=True))
    error = math.sqrt(p * (1 - p) / (worth[0] + 2) + q * (1 - q) / (worth[1] + 2))
    n, value = len(first) + len(second), float(second.mean() - first.mean())
    return _normal(value, q - p, error, n, sum(worth), "Agresti and Caffo's adjusted interval")


def _normal(
    value: float, centre: float | np.floating, error: float, n: int, worth: float | int, method: str
) -> Resampled:
    low, high = (float(np.clip(centre + side * Z * error, -1, 1)) for side in (-1, 1))

    def at(change: float) -> float:
        return 2 * float(scipy_stats.norm.sf(abs(centre - change) / error))

    found = Estimate(value, min(low, value), max(high, value), n, float(worth), method)
    return Resampled(found, at(0.0), at)
