"""How well a score tells two classes apart: AUROC with an interval that has a width even where they never overlap.

    DeLong on the logit scale    se^2 of the placements (DeLong et al. 1988; clusters: Obuchowski 1997), Student's t
    Newcombe's method 5          |t - a| = z sqrt(V(t)),  V from the exponential model (Newcombe 2006, Stat. Med. 25)

The wider end on either side: DeLong's variance vanishes at 1, and the exponential model is one shape among many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy import optimize
from scipy import stats as scipy_stats

from tl_em.stats.estimate import Estimate
from tl_em.stats.rates import Z
from tl_em.stats.units import Groups, Units, design_effect, units_of


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
        groups: the question of each prompt of either class; prompts of one question count as one cluster.
        pairs: weight of each pair; 1 by default.
        seed: kept for calls that give one; nothing is drawn.

    Example:
        >>> auroc(np.array([2.0, 3.0, 4.0]), np.array([1.0, 2.5, 0.5]))
        0.89 [0.09, 1.00] n=6
        >>> auroc(np.arange(8.0) + 10, np.arange(8.0)).low < 0.8
        True
    """
    weights = np.ones((len(first), len(second))) if pairs is None else np.asarray(pairs, dtype=float)
    above, n = share_above(first, second), len(first) + len(second)
    total = weights.sum()
    value = float((weights * above).sum() / total) if total > 0 else 0.5
    placed = [(weights * (above - value)).sum(axis) / max(total, 1e-300) for axis in (1, 0)]
    labels = list(groups or (len(first), len(second)))
    units = units_of(labels)
    effects = [1.0 if isinstance(g, int) else design_effect(x, g) for x, g in zip(placed, labels, strict=True)]
    worth = [len(x) / effect for x, effect in zip(placed, effects, strict=True)]
    if min(units.strata) < 2:
        return Estimate(value, math.nan, math.nan, n, 0.0 + sum(worth), "fewer than two units, no interval")
    low, high = _newcombe(value, *worth)
    error, df = _delong(placed, units)
    if error > 0:  # which it is not where the classes never overlap
        middle, half = math.log(value / (1 - value)), scipy_stats.t.ppf(0.975, df) * error / (value * (1 - value))
        ends = [1 / (1 + math.exp(-min(max(middle + side * half, -700), 700))) for side in (-1, 1)]
        low, high = min(low, ends[0]), max(high, ends[1])
    method = f"{'' if groups is None else 'question-clustered, '}DeLong on the logit scale and Newcombe's, wider ends"
    return Estimate(value, low, high, n, 0.0 + sum(worth), method)


def auroc_of(
    scores: Float[np.ndarray, "*permutation prompt"], labels: Bool[np.ndarray, "permutation prompt"]
) -> Float[np.ndarray, " permutation"]:
    """AUROC (Mann and Whitney's, from ranks) under each labelling, of the same scores or of scores of its own.

    Args:
        scores: one a prompt.
        labels: which prompts are of the first class.

    Example:
        >>> auroc_of(np.array([3.0, 1.0, 2.0]), np.array([[True, False, False], [False, True, False]])).tolist()
        [1.0, 0.0]
    """
    positive = labels.sum(1)
    ranks = (labels * scipy_stats.rankdata(scores, axis=-1)).sum(1) - positive * (positive + 1) / 2
    return ranks / (positive * (labels.shape[1] - positive))


def share_above(first: np.ndarray, second: np.ndarray) -> Float[np.ndarray, "prompt other"]:
    """For each pair 1 where the first is higher, 1/2 where both are alike, else 0."""
    return (first[:, None] > second) + 0.5 * (first[:, None] == second)


def _delong(placed: Sequence[np.ndarray], units: Units) -> tuple[float, float]:
    """Standard error from what each unit adds to the share, and degrees of freedom."""
    added = [np.zeros(size) for size in units.strata]
    for x, (stratum, index) in zip(placed, units.members, strict=True):
        added[stratum] += np.bincount(index, x, units.strata[stratum])
    each = [(k / (k - 1) * float((a**2).sum()), k - 1) for a, k in zip(added, units.strata, strict=True)]
    total = sum(v for v, _ in each)
    return math.sqrt(total), total**2 / sum(v**2 / k for v, k in each) if total > 0 else float(each[0][1])


def _newcombe(value: float, n: float | int, m: float | int) -> tuple[float, float]:
    """Newcombe's method 5."""
    others = (n + m) / 2 - 1

    def apart(t: float) -> float:
        spread = t * (1 - t) + others * (t / (2 - t) - t**2 + 2 * t**2 / (1 + t) - t**2)
        return (t - value) ** 2 - Z**2 * spread / (n * m)

    step = 1e-9
    low = optimize.brentq(apart, 0.0, value - step) if value > step else 0.0
    high = optimize.brentq(apart, value + step, 1.0) if value < 1 - step else 1.0
    return float(low), float(high)  # type: ignore[arg-type]
