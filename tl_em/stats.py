"""Intervals, resampling, controls and multiplicity: the only place where the prompt axis is reduced.

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
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from tl_em.arguments import COUNT, SEED, checked, finite
from tl_em.errors import UsageError

Groups = Sequence[Hashable]
RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, its sample and how it was made.

    Args:
        value: the point estimate.
        low: lower end of the 95 % interval; NaN when there are fewer than two units.
        high: upper end of the interval.
        n: number of prompts.
        n_effective: what those prompts are worth as independent ones, given their clustering by question.
        method: how the interval was made.
        seed: seed of the resampling.

    Example:
        >>> Estimate(0.42, 0.31, 0.53, n=128, n_effective=128.0, method="bootstrap", seed=0)
        0.42 [0.31, 0.53] n=128
    """

    value: float
    low: float
    high: float
    n: int
    n_effective: float
    method: str
    seed: int | None = None

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.estimate(self)

    def __repr__(self) -> str:
        if not math.isfinite(self.low):
            return f"{self.value:.2f} [no interval] n={self.n}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] n={self.n}"

    __str__ = __repr__

    @checked(threshold=finite)
    def beyond(self, threshold: float | int) -> bool:
        """Whether the whole interval lies beyond ``threshold`` on one side: above it, or below its negative.

        Example:
            >>> Estimate(0.42, 0.31, 0.53, n=128, n_effective=128.0, method="bootstrap").beyond(0.3)
            True
        """
        return self.low > threshold or self.high < -threshold

    @checked(factor=finite)
    def scaled(self, factor: float) -> Estimate:
        """The same estimate in other units: value and interval times ``factor`` (a negative one swaps the ends)."""
        ends = sorted((self.low * factor, self.high * factor))
        return replace(self, value=self.value * factor, low=ends[0], high=ends[1])

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes ``None``, since JSON has no NaN."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Estimate:
        """Back from :meth:`to_json`.

        Example:
            >>> Estimate.from_json(Estimate(0.4, float("nan"), 0.5, 8, 8.0, "bootstrap").to_json())
            0.40 [no interval] n=8
        """
        fields: dict[str, Any] = {k: math.nan if v is None and k != "seed" else v for k, v in plain.items()}
        return cls(**fields)


class Resampled(NamedTuple):
    """What a bootstrap gives: the estimate, and the two-sided p of "the statistic is 0"."""

    estimate: Estimate
    p: float


class _Units(NamedTuple):
    """The units that are drawn: how many there are in each stratum, and each sample's prompts in terms of them."""

    strata: list[int]
    members: list[tuple[int, Int[np.ndarray, " prompt"]]]


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
    units = _units(samples)
    sizes = [len(index) for _, index in units.members]
    point = float(statistic(*[np.ones((1, n)) for n in sizes])[0])
    n, worth = sum(sizes), _n_effective(samples, statistic, sizes)
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


def _units(samples: Sequence[int | Groups]) -> _Units:
    labels = [[(i, k) for k in range(s)] if isinstance(s, int) else list(s) for i, s in enumerate(samples)]
    if not labels or any(not each for each in labels):
        raise UsageError("a sample has no prompts: nothing can be estimated from it; pass at least one prompt a class")
    joint = sum(len(set(each)) for each in labels) > len(set().union(*labels))
    strata: list[int] = []
    members: list[tuple[int, np.ndarray]] = []
    index: dict[Hashable, int] = {}
    for stratum, each in enumerate(labels):
        if not joint:
            index = {}
        members.append((0 if joint else stratum, np.array([index.setdefault(label, len(index)) for label in each])))
        strata = [len(index)] if joint else [*strata, len(index)]
    return _Units(strata, members)


def _draw(statistic: Callable[..., np.ndarray], units: _Units, *, seed: int, resamples: int) -> np.ndarray:
    """The bootstrap distribution, from scipy, with the drawn unit numbers turned into weights."""

    def of_draw(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        counts = [_counts(np.atleast_2d(d), size) for d, size in zip(drawn, units.strata, strict=True)]
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


def _counts(drawn: Int[np.ndarray, "resample unit"], size: int) -> Float[np.ndarray, "resample unit"]:
    flat = drawn + size * np.arange(len(drawn))[:, None]
    return np.bincount(flat.ravel(), minlength=size * len(drawn)).reshape(len(drawn), size).astype(float)


def _tails(units: int) -> tuple[float, float]:
    """The percentile ends whose coverage is nominal for a mean of this many units (Hesterberg 2015)."""
    quantile = scipy_stats.t.ppf(0.5 - LEVEL / 2, units - 1) * math.sqrt(units / (units - 1))
    tail = float(scipy_stats.norm.cdf(quantile))
    return tail, 1 - tail


def _n_effective(samples: Sequence[int | Groups], statistic: Callable[..., np.ndarray], sizes: list[int]) -> float:
    """Prompts over the design effect, from the intraclass correlation of each prompt's influence on the statistic."""
    total = 0.0
    for i, sample in enumerate(samples):
        if isinstance(sample, int) or len(set(sample)) == sizes[i]:
            total += sizes[i]
            continue
        weights = [np.ones((sizes[i], n)) for n in sizes]
        weights[i] = weights[i] + 1e-3 * np.eye(sizes[i])
        total += sizes[i] / design_effect(statistic(*weights), sample)
    return total


def intraclass_correlation(values: Float[np.ndarray, " prompt"], groups: Groups) -> float:
    """Share of variance that lies between groups: the one-way ANOVA estimator, clipped to [0, 1] (Donner 1986).

    Example:
        >>> intraclass_correlation(np.array([1.0, 1.0, 5.0, 5.0]), ["a", "a", "b", "b"])
        1.0
    """
    _, index, counts = np.unique([str(g) for g in groups], return_inverse=True, return_counts=True)
    k, n = len(counts), len(values)
    if k < 2 or n == k:
        return 0.0
    means = np.bincount(index, weights=values) / counts
    between = float(np.sum(counts * (means - values.mean()) ** 2)) / (k - 1)
    within = float(np.sum((values - means[index]) ** 2)) / (n - k)
    size = (n - np.sum(counts**2) / n) / (k - 1)
    spread = between + (size - 1) * within
    return float(np.clip((between - within) / spread, 0, 1)) if spread > 0 else 0.0


def design_effect(values: Float[np.ndarray, " prompt"], groups: Groups) -> float:
    """How many clustered prompts one independent prompt is worth: ``1 + (m - 1) r``, m the mean group size."""
    size = len(values) / len(set(groups))
    return 1 + (size - 1) * intraclass_correlation(np.asarray(values, dtype=float), groups)


@checked(seed=SEED)
def mean(values: ArrayLike, *, groups: Groups | None = None, seed: int = 0) -> Estimate:
    """Mean over prompts with its interval, clustered by ``groups`` when they are given.

    Example:
        >>> mean([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
        0.62 [0.25, 1.00] n=8
    """
    x = _vector(values)
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

    x, rows = _vector(values), list(units)
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

    Raises:
        UsageError: the two are not of one length, or hold NaN.
    """
    first, second = _vector(before), _vector(after)
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
    """Mean of ``second`` minus mean of ``first``, for two unpaired sets of prompts."""
    x, y = _vector(first), _vector(second)
    return bootstrap(lambda v, w: w @ y / w.sum(-1) - v @ x / v.sum(-1), list(groups or (len(x), len(y))), seed=seed)


@checked(seed=SEED, permutations=COUNT)
def permutation_p(first: ArrayLike, second: ArrayLike, *, seed: int = 0, permutations: int = 9999) -> float:
    """Two-sided permutation p for a difference of means between two unpaired sets (``scipy.stats.permutation_test``).

    Example:
        >>> permutation_p([0.0, 0.1, 0.2, 0.1], [5.0, 5.1, 5.2, 5.3]) < 0.05
        True
    """
    result = scipy_stats.permutation_test(
        (_vector(first), _vector(second)),
        lambda x, y, axis: np.mean(y, axis=axis) - np.mean(x, axis=axis),
        n_resamples=permutations,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def control_p(observed: float, controls: ArrayLike, *, two_sided: bool = True) -> float:
    """Share of controls at least as large as what was observed, the observed one counted in: ``(1 + k) / (1 + n)``.

    Example:
        >>> control_p(3.0, [0.1, -0.2, 0.4])
        0.25
    """
    x = _vector(controls)
    k = np.sum(np.abs(x) >= abs(observed)) if two_sided else np.sum(x >= observed)
    return float((1 + k) / (1 + len(x)))


def holm(p: ArrayLike) -> Float[np.ndarray, " test"]:
    """Holm's step-down adjustment (statsmodels), which controls the chance of any false claim.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    return _adjusted(p, "holm")


def benjamini_hochberg(p: ArrayLike) -> Float[np.ndarray, " test"]:
    """Benjamini and Hochberg's adjustment (statsmodels), which controls the share of false claims.

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.04, 0.04]
    """
    return _adjusted(p, "fdr_bh")


def _adjusted(p: ArrayLike, method: str) -> np.ndarray:
    from statsmodels.stats.multitest import multipletests

    values = np.atleast_1d(np.asarray(p, dtype=float))
    known = np.isfinite(values)
    adjusted = np.full(values.shape, np.nan)
    if known.any():
        adjusted[known] = multipletests(values[known], method=method)[1]
    return adjusted


def _vector(values: ArrayLike) -> Float[np.ndarray, " prompt"]:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise UsageError(
            f"expected one finite number for each prompt, got shape {x.shape} with "
            f"{int(np.sum(~np.isfinite(x)))} not finite; a mean over them would be meaningless: check the metric"
        )
    return x
