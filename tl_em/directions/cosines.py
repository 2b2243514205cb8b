"""The cosine of two differences in means: its interval, what noise leaves of it, and its null under relabelling.

A *unit* is what prompts share: a text, a group label, a pair (classes of equal length without groups), directly or
through other prompts, within a set and across two.  Differences in means are sums ``a @ x`` with signed weights a over
the rows of a set, so their lengths and products are quadratic in the weights, and only products of rows are needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from tl_em.models.contrasts import ContrastSet
from tl_em.stats import Estimate, bootstrap, half_splits, tied

RESAMPLES = 1000
_MIXED = 2
"""The class of a unit with prompts of both classes."""

Weights = Float[np.ndarray, "draw prompt"]
Products = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Products of the rows, or of directions: first with first, second with second, first with second."""


class Rows(NamedTuple):
    """Activations of a contrast set less their common mean, which of them are positive, and what ties them together."""

    x: Float[np.ndarray, "prompt d_model"]
    positive: Bool[np.ndarray, " prompt"]
    ties: list[tuple[Any, ...]]

    @classmethod
    def of(cls, x: Float[np.ndarray, "prompt d_model"], contrast: ContrastSet, name: str) -> Rows:
        """Rows are the positive prompts, then the negative ones; ``name`` keeps two sets' pairs apart."""
        positive = np.arange(len(x)) < len(contrast.positive)
        return cls(x - x.mean(0), positive, _ties(name, contrast))

    @property
    def residual(self) -> Float[np.ndarray, "prompt d_model"]:
        """Each class less its own mean."""
        means = np.stack([self.x[self.positive == side].mean(0) for side in (False, True)])
        return self.x - means[self.positive.astype(int)]


def _ties(name: str, contrast: ContrastSet) -> list[tuple[Any, ...]]:
    """For each prompt what it may share with others: its text, and its group or its place in a pair."""
    sides = ((contrast.positive, contrast.positive_groups), (contrast.negative, contrast.negative_groups))
    paired = len(contrast.positive) == len(contrast.negative)
    found = []
    for side, (prompts, groups) in enumerate(sides):
        for i, prompt in enumerate(prompts):
            own = ("group", groups[i]) if groups is not None else ("pair", name, i if paired else (side, i))
            text = prompt if isinstance(prompt, str) else json.dumps([dict(m) for m in prompt], sort_keys=True)
            found.append((("text", text), own))
    return found


def _classes(
    positive: Bool[np.ndarray, " prompt"], unit: Int[np.ndarray, " prompt"], n: int
) -> Int[np.ndarray, " unit"]:
    """The class of each of ``n`` units in a set: 0, 1, ``_MIXED``, or -1 where the set has no prompt of it."""
    share = np.bincount(unit, weights=positive, minlength=n) / np.maximum(np.bincount(unit, minlength=n), 1)
    found = np.where(share == 0, 0, np.where(share == 1, 1, _MIXED))
    return np.where(np.isin(np.arange(n), unit), found, -1)


def _signed(weights: Weights, positive: Weights | Bool[np.ndarray, "#draw prompt"]) -> Weights:
    """Weights whose product with the rows is the difference in means; all 0 where a class has no weight."""
    up, down = weights * positive, weights * (1 - positive)
    sums = up.sum(-1, keepdims=True), down.sum(-1, keepdims=True)
    full = (sums[0] > 0) & (sums[1] > 0)
    return np.where(full, up / np.where(full, sums[0], 1) - down / np.where(full, sums[1], 1), 0.0)


def _product(
    a: Weights, rows: Float[np.ndarray, "prompt other"], b: Float[np.ndarray, "draw other"]
) -> Float[np.ndarray, " draw"]:
    return ((a @ rows) * b).sum(-1)


def _products(a: Weights, b: Float[np.ndarray, "draw other"], rows: Products) -> Products:
    """Squared lengths, and the product, of the directions that these weights give."""
    return _product(a, rows[0], a), _product(b, rows[1], b), _product(a, rows[2], b)


def _cosines(aa: np.ndarray, bb: np.ndarray, ab: np.ndarray) -> Float[np.ndarray, " draw"]:
    """Cosines from squared lengths and products; the sign of the product where a length is not above 0."""
    scale = np.sqrt(np.maximum(aa, 0) * np.maximum(bb, 0))
    return np.clip(np.where(scale > 0, ab / np.where(scale > 0, scale, 1), np.sign(ab)), -1, 1)


def reliability(rows: Rows, *, splits: int, seed: int) -> float:
    """The cosine that a direction would have with that of as many other prompts; NaN where a class cannot be halved."""
    unit = tied(rows.ties)
    kind = _classes(rows.positive, unit, int(unit.max()) + 1)[unit]
    half = np.zeros((splits, len(unit)))
    for k in set(kind.tolist()):  # positive, negative and mixed units one by one, so that each half has both classes
        half[:, kind == k] = half_splits(list(unit[kind == k]), splits=splits, seed=seed + k)
    a, b = _signed(half, rows.positive[None]), _signed(1 - half, rows.positive[None])
    both = a.any(-1) & b.any(-1)
    if not both.any():
        return float("nan")
    square = rows.x @ rows.x.T
    r = _cosines(*_products(a, b, (square, square, square)))
    mean = max(float(r[both].mean()), 0.0)
    return 2 * mean / (1 + mean)


@dataclass(frozen=True, eq=False)
class Two:
    """Two sets, their common units, and the products of their rows and of their residuals."""

    positive: tuple[Bool[np.ndarray, " prompt"], Bool[np.ndarray, " other"]]
    units: tuple[Int[np.ndarray, " prompt"], Int[np.ndarray, " other"]]
    raw: Products
    residual: Products

    @classmethod
    def of(cls, first: Rows, second: Rows) -> Two:
        """Two sets side by side."""
        unit = np.split(tied([*first.ties, *second.ties]), [len(first.ties)])
        x, y, r, s = first.x, second.x, first.residual, second.residual
        raw, residual = (x @ x.T, y @ y.T, x @ y.T), (r @ r.T, s @ s.T, r @ s.T)
        return cls((first.positive, second.positive), (unit[0], unit[1]), raw, residual)

    @property
    def shared(self) -> int:
        """Number of units that both sets hold."""
        return len(np.intersect1d(*self.units))

    @property
    def observed(self) -> float:
        """The cosine."""
        return float(_cosines(*_products(*self._whole, self.raw))[0])

    @property
    def _whole(self) -> tuple[Weights, Float[np.ndarray, "draw other"]]:
        a, b = (_signed(np.ones((1, len(p))), p[None]) for p in self.positive)
        return a, b

    def estimate(self, *, seed: int) -> Estimate:
        """The cosine with its interval; the noise that resampling adds is taken off lengths and product."""
        whole, (u, v) = self._whole, self.units
        first, second, both = self.residual
        own = first * (u[:, None] == u), second * (v[:, None] == v), both * (u[:, None] == v)

        def statistic(*w: np.ndarray) -> np.ndarray:
            weights = np.concatenate(w[:2], -1), np.concatenate(w[2:], -1)
            a, b = (_signed(each, p[None]) for each, p in zip(weights, self.positive, strict=True))
            drawn, added = _products(a, b, self.raw), _products(a - whole[0], b - whole[1], own)
            cosines = _cosines(*(with_noise - noise for with_noise, noise in zip(drawn, added, strict=True)))
            return np.where(a.any(-1) & b.any(-1), cosines, 0.0)

        pairs = zip(self.units, self.positive, strict=True)
        samples = [unit[p == side].tolist() for unit, p in pairs for side in (True, False)]
        return bootstrap(statistic, samples, seed=seed, resamples=RESAMPLES).estimate

    def relabelled(self, draws: int, *, seed: int) -> Float[np.ndarray, " draw"]:
        """Cosines of the differences in means of relabelled residuals; 1 where relabelling leaves no difference.

        Units of both classes change sign or not, units of one class trade places with such as lie in the same sets.
        """
        n = 1 + max(int(unit.max()) for unit in self.units)
        classes = [_classes(p, u, n) for p, u in zip(self.positive, self.units, strict=True)]
        rng = np.random.default_rng(seed)
        flips = rng.random((draws, n)) < 0.5
        source = np.tile(np.arange(n), (draws, 1))
        kinds = np.stack([np.where(c == 1, 0, c) for c in classes])
        for kind in np.unique(kinds, axis=1).T:
            where = np.flatnonzero((kinds == kind[:, None]).all(0))
            source[:, where] = rng.permuted(np.tile(where, (draws, 1)), axis=1)
        weights = []
        for c, p, u in zip(classes, self.positive, self.units, strict=True):
            label = np.where(c[u] == _MIXED, p ^ flips[:, u], c[source[:, u]] == 1)
            weights.append(_signed(np.ones(label.shape), label))
        parts = _products(weights[0], weights[1], self.residual)
        rounding = [1e-12 * weights[i] ** 2 @ np.diag(self.raw[i]) for i in (0, 1)]
        return np.where((parts[0] > rounding[0]) & (parts[1] > rounding[1]), _cosines(*parts), 1.0)
