"""A number that a person sees: with its interval, its sample and how it was made; and the band of its controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tl_em.arguments import SEED, checked, finite, optional, several
from tl_em.artefacts import checked_fields
from tl_em.errors import UsageError


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

    @checked()
    def row(self, name: str = "") -> dict[str, Any]:
        """Cells of a table: value, low, high and n; with a name, that column with its ``_low`` and ``_high``.

        Example:
            >>> found = Estimate(0.42, 0.31, 0.53, n=128, n_effective=128.0, method="bootstrap")
            >>> found.row(), found.row("kl")
            ({'value': 0.42, 'low': 0.31, 'high': 0.53, 'n': 128}, {'kl': 0.42, 'kl_low': 0.31, 'kl_high': 0.53})
        """
        if name:
            return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    @classmethod
    @checked(seed=optional(SEED), values=several)
    def band(cls, values: ArrayLike, of: str = "random directions", *, seed: int | None = None) -> Estimate:
        """The mean over controls with the band that holds 95 % of them (not an interval of the mean).

        Example:
            >>> Estimate.band(range(101)).low, Estimate.band(range(101)).high
            (2.5, 97.5)
        """
        try:
            x = np.asarray(values, dtype=float)
        except (TypeError, ValueError) as error:
            raise UsageError(f"values hold what is no number ({error}). Give values a number each.") from error
        low, high = middle_95(x)
        said = f"2.5-97.5 % band of {of}"
        return cls(float(x.mean()), float(low), float(high), len(x), float(len(x)), said, seed)

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes ``None``, since JSON has no NaN."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}

    @classmethod
    @checked()
    def from_json(cls, plain: Mapping[str, Any]) -> Estimate:
        """Back from :meth:`to_json`.

        Example:
            >>> Estimate.from_json(Estimate(0.4, float("nan"), 0.5, 8, 8.0, "bootstrap").to_json())
            0.40 [no interval] n=8
        """
        fields = {k: math.nan if v is None and k != "seed" else v for k, v in dict(plain).items()}
        return cls(**checked_fields(cls, fields))


class Resampled(NamedTuple):
    """The estimate, the two-sided p of "it is 0", and that of any other value.

    Args:
        estimate: the value with its interval.
        p: two-sided.
        at: the two-sided p of another value than 0.

    Example:
        >>> from tl_em.stats import paired_difference
        >>> found = paired_difference([0.0, 0.2, 0.1], [1.0, 1.1, 1.2])
        >>> found.p < 0.05, found.within(0.5) < found.within(0.9)
        (True, True)
    """

    estimate: Estimate
    p: float
    at: Callable[[float], float] | None = None

    @property
    def reversed(self) -> Resampled:
        """The same of the opposite effect."""
        at = self.at
        return Resampled(self.estimate.scaled(-1), self.p, None if at is None else lambda value: at(-value))

    def within(self, smallest: float) -> float:
        """Two-sided p of "no farther from 0 than this": below .05 just where the interval lies beyond it.

        Args:
            smallest: not negative.
        """
        value = self.estimate.value
        if not abs(value) > smallest:
            return 1.0
        if self.at is not None:
            return self.at(math.copysign(smallest, value))
        near = self.estimate.low if value > 0 else self.estimate.high  # as if normal on that side
        away = (abs(value) - smallest) / max(abs(value - near), 1e-300)
        return math.erfc(1.959964 * away / math.sqrt(2)) if math.isfinite(near) else 1.0


def middle_95(values: ArrayLike, axis: int | None = None) -> np.ndarray:
    """The ends that hold the middle 95 % of values: [2] of all of them, or [2, ...] along an axis.

    Args:
        values: of any shape.
        axis: along which; all of them without one.

    Example:
        >>> middle_95(np.arange(101.0)).tolist()
        [2.5, 97.5]
    """
    return np.quantile(np.asarray(values, dtype=float), [0.025, 0.975], axis=axis)
