"""What the next benign fine-tune would show: fine-tunes are drawn here, and prompts within them.

    D +- sqrt( h^2 + (t_{m-1} s_b)^2 (1 + 1/m) + (t_{a-1} s_t)^2 / a )

with D the mean change of ``a`` tuned less that of ``m`` benign fine-tunes, h half of its interval over prompts, s_b and
s_t the standard deviations between fine-tunes of either kind and t Student's quantiles.  A tuned model that is one more
benign fine-tune falls outside in 5 % (Hahn & Meeker 1991, section 4.7).  Reaches are added and not variances with
Satterthwaite's degrees of freedom (MOVER, Zou & Donner 2008): of two or three fine-tunes a spread is small by chance so
often that the latter lets 10 % through.  s_t counts from ``REPEATED`` tuned ones on; with fewer D is the first one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, t

from tl_em.stats.estimate import Estimate, Resampled
from tl_em.stats.intervals import LEVEL, RESAMPLES, bootstrap
from tl_em.stats.units import Groups

MOST = 50
"""Benign fine-tunes that are looked through for how many would do."""
REPEATED = 3
"""Tuned fine-tunes of which the spread counts."""


@dataclass(frozen=True)
class Prediction:
    """How far tuned fine-tunes go beyond what the next benign one would show.

    Args:
        difference: mean of the tuned less mean of the benign fine-tunes, resampled over prompts.
        own: each tuned fine-tune's value; what is common to all of them does not matter.
        benign: each benign one's; two or more.
        farther: how much farther tuned moved the whole stream than benign did, 1 where it did not.

    Example:
        >>> from tl_em.stats import paired_difference
        >>> prompts = paired_difference([0.0, 0.1, -0.1, 0.05], [1.0, 1.2, 0.9, 1.1])
        >>> beyond = Prediction(prompts, own=(1.05,), benign=(0.1, -0.1, 0.0))
        >>> beyond.estimate, beyond.needed(0.5)
        (1.04 [0.53, 1.54] n=3, 3)
    """

    difference: Resampled
    own: tuple[float, ...]
    benign: tuple[float, ...]
    farther: float = 1.0

    @property
    def estimate(self) -> Estimate:
        """D with its interval; n counts the benign fine-tunes."""
        e, m, tail = self.difference.estimate, len(self.benign), (1 - LEVEL) / 2
        low, high = e.value - self._reach(tail, -1), e.value + self._reach(tail, 1)
        method = f"prediction interval of the next benign fine-tune, from {len(self.own)} tuned and {m} benign"
        return Estimate(e.value, low, high, m, float(m), f"{method}; prompts: {e.method}", e.seed)

    def within(self, smallest: float | int, *, as_far: bool = False) -> float:
        """Two-sided p of "no farther than this beyond the next benign fine-tune": below .05 where the interval is.

        Args:
            smallest: not negative.
            as_far: whether benign fine-tunes are taken to differ as if they had moved the stream as far as tuned.
        """
        value, factor = self.difference.estimate.value, self.farther if as_far else 1.0

        def left(log_tail: float) -> float:
            return abs(value) - self._reach(math.exp(log_tail), -math.copysign(1, value), factor=factor) - smallest

        least, most = math.log(1e-12), math.log(0.5)
        if left(most) <= 0 or left(least) >= 0:
            return 1.0 if left(most) <= 0 else 2 * math.exp(least)
        root: Any = brentq(left, least, most)
        return 2 * math.exp(root)

    def needed(self, smallest: float | int) -> int | None:
        """How many benign fine-tunes of this spread would put the whole interval beyond ``smallest``; None: no number.

        Args:
            smallest: not negative.
        """
        value, tail = self.difference.estimate.value, (1 - LEVEL) / 2
        side = -math.copysign(1, value)
        return next((m for m in range(2, MOST + 1) if abs(value) - self._reach(tail, side, m) > smallest), None)

    def _reach(self, tail: float, side: float | int, count: int | None = None, factor: float = 1.0) -> float:
        """From D to the end of the interval on one side, with so many benign fine-tunes and so much in each tail."""
        e, a, m = self.difference.estimate, len(self.own), count or len(self.benign)
        prompts = abs((e.low if side < 0 else e.high) - e.value) * norm.isf(tail) / norm.isf((1 - LEVEL) / 2)
        between = np.std(self.benign, ddof=1) * factor * math.sqrt(1 + 1 / m) * t.isf(tail, m - 1)
        own = np.std(self.own, ddof=1) / math.sqrt(a) * t.isf(tail, a - 1) if a > 1 else 0.0
        return float(np.sqrt(prompts**2 + between**2 + own**2))


def beyond_next(
    own: Sequence[Callable[..., np.ndarray]],
    benign: Sequence[Callable[..., np.ndarray]],
    samples: Sequence[int | Groups],
    *,
    per: Callable[..., np.ndarray] | None = None,
    farther: float = 1.0,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Resampled | Prediction:
    """How far tuned fine-tunes go beyond benign ones; beyond the next one, where there are several.

    Args:
        own: each tuned fine-tune's statistic, as ``bootstrap`` takes it; with fewer than ``REPEATED``, or one
            benign, the first counts.
        benign: the same of each benign one; one or more.
        samples: what is drawn, as for ``bootstrap``.
        per: what the statistics are divided by.
        farther: as in :class:`Prediction`.
        seed: seed of the draws.
        resamples: number of draws.

    Returns:
        With one benign fine-tune the tuned one less it, over prompts only; else a Prediction.

    Example:
        >>> x, spread = np.linspace(-1, 1, 20), np.sin(np.arange(60)).reshape(3, 20) / 10
        >>> def of(values): return lambda w: (w * values).sum(-1) / w.sum(-1)
        >>> found = beyond_next([of(x + 1)], [of(x + each) for each in spread], [20])
        >>> round(found.estimate.value, 1), found.estimate.low > 0.5, found.estimate.n
        (1.0, True, 3)
    """
    own = own if len(benign) > 1 and len(own) >= REPEATED else own[:1]

    def divided(*weights: np.ndarray) -> np.ndarray:
        value = _mean(own, weights) - _mean(benign, weights)
        return value if per is None else value / per(*weights)

    difference = bootstrap(divided, samples, seed=seed, resamples=resamples)
    if len(benign) < 2:
        return difference
    whole = [np.ones((1, each if isinstance(each, int) else len(each))) for each in samples]
    unit = 1.0 if per is None else float(per(*whole)[0])
    first, others = (tuple(float(f(*whole)[0]) / unit for f in side) for side in (own, benign))
    return Prediction(difference, first, others, farther)


def _mean(statistics: Sequence[Callable[..., np.ndarray]], weights: Sequence[np.ndarray]) -> np.ndarray:
    first, *others = (statistic(*weights) for statistic in statistics)
    return sum(others, first) / len(statistics) if others else first
