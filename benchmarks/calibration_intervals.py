"""Samples whose truth is known, and the interval that the package gives for each: the rows of ``calibration.py``.

Every row draws its sample from its own generator and returns the estimate beside the truth.  Nothing here knows how an
interval is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import stats as scipy_stats

from tl_em.stats import Estimate, auroc, difference, mean, mean_over_units, paired_difference

Drawn = tuple[Estimate, float]
"""The estimate and the p of "the truth is 0" (NaN where none is given)."""


@dataclass(frozen=True)
class Row:
    """One kind of sample.

    Args:
        name: what is estimated.
        size: of the sample, in words.
        truth: what the interval should hold.
        draw: makes a sample from a generator and a seed, and estimates from it.
        span: the range that the truth can lie in.
        null: whether p is judged too: the truth is 0.
    """

    name: str
    size: str
    truth: float
    draw: Callable[[np.random.Generator, int], Drawn]
    span: tuple[float, float] = (-math.inf, math.inf)
    null: bool = False


def rows() -> list[Row]:
    """Every row, in the order of the table."""
    from calibration_together import interval_rows

    own = [*_small(), *_skewed(), *_rates(), *_clustered(), *_paired(), *_between(), *_auroc(), *_over_seeds()]
    return [*own, *interval_rows()]


def _of_mean(sample: Callable[[np.random.Generator], np.ndarray], rng: np.random.Generator, seed: int) -> Drawn:
    x = sample(rng)
    found = paired_difference(np.zeros_like(x), x, seed=seed)
    return found.estimate, found.p


def _small() -> Iterator[Row]:
    for n in (3, 4, 5, 8, 16, 32, 128):
        draw = partial(_of_mean, lambda rng, n=n: rng.standard_normal(n))
        yield Row("mean of a normal outcome", f"{n} prompts", 0.0, draw, null=True)


def _skewed() -> Iterator[Row]:
    for n in (8, 32, 128):
        draw = partial(_of_mean, lambda rng, n=n: rng.lognormal(size=n))
        yield Row("mean of a log-normal outcome", f"{n} prompts", math.exp(0.5), draw)
    for n in (8, 32, 128):
        draw = partial(_of_mean, lambda rng, n=n: rng.standard_t(3, n))
        yield Row("mean of a t(3) outcome", f"{n} prompts", 0.0, draw, null=True)


def _rates() -> Iterator[Row]:
    for p in (0.01, 0.05, 0.1, 0.5):
        for n in (8, 16, 60, 128):

            def draw(rng: np.random.Generator, seed: int, n: int = n, p: float = p) -> Drawn:
                return mean((rng.random(n) < p).astype(float), seed=seed), math.nan

            yield Row(f"rate of {p:g}", f"{n} answers", p, draw, (0.0, 1.0))
    for a, b in ((0.5, 9.5), (2.0, 2.0), (9.0, 1.0)):
        for n in (8, 32, 128):

            def graded(rng: np.random.Generator, seed: int, n: int = n, a: float = a, b: float = b) -> Drawn:
                return mean(rng.beta(a, b, n), bounds=(0.0, 1.0), seed=seed), math.nan

            yield Row(f"mean probability, Beta({a:g}, {b:g})", f"{n} prompts", a / (a + b), graded, (0.0, 1.0))


def _clustered() -> Iterator[Row]:
    for p, size in ((0.05, 6), (0.3, 6)):
        for questions in (10, 20, 40):

            def draw(
                rng: np.random.Generator, seed: int, questions: int = questions, p: float = p, size: int = size
            ) -> Drawn:
                rate = rng.beta(p, 1 - p, questions)  # intraclass correlation .5
                answered = (rng.random((questions, size)) < rate[:, None]).astype(float)
                groups = np.repeat(np.arange(questions), size).tolist()
                return mean(answered.ravel(), groups=groups, seed=seed), math.nan

            yield Row(f"rate of {p:g}, clustered (.5)", f"{questions} questions x {size}", p, draw, (0.0, 1.0))
    for questions in (8, 16, 32):

        def normal(rng: np.random.Generator, seed: int, questions: int = questions) -> Drawn:
            x = rng.standard_normal((questions, 1)) + rng.standard_normal((questions, 6))
            groups = np.repeat(np.arange(questions), 6).tolist()
            found = paired_difference(np.zeros(x.size), x.ravel(), groups=groups, seed=seed)
            return found.estimate, found.p

        yield Row("mean of a clustered outcome (.5)", f"{questions} questions x 6", 0.0, normal, null=True)


def _paired() -> Iterator[Row]:
    for n in (8, 32, 128):
        for worse, better in ((0.05, 0.0), (0.08, 0.03)):

            def draw(rng: np.random.Generator, seed: int, n: int = n, up: float = worse, down: float = better) -> Drawn:
                u = rng.random(n)
                found = paired_difference((u > 1 - down).astype(float), (u < up).astype(float), seed=seed)
                return found.estimate, found.p

            name = f"paired change of a rate, {worse:g} up and {better:g} down"
            yield Row(name, f"{n} prompts", 0.05, draw, (-1.0, 1.0))


def _between() -> Iterator[Row]:
    for n in (8, 32, 128):
        for p, q in ((0.0, 0.05), (0.05, 0.1), (0.4, 0.6)):

            def draw(rng: np.random.Generator, seed: int, n: int = n, p: float = p, q: float = q) -> Drawn:
                first, second = ((rng.random(n) < each).astype(float) for each in (p, q))
                found = difference(first, second, seed=seed)
                return found.estimate, found.p

            yield Row(f"difference of rates, {p:g} and {q:g}", f"{n} and {n} answers", q - p, draw, (-1.0, 1.0))
    for n, m in ((4, 6), (8, 8), (32, 32)):

        def normal(rng: np.random.Generator, seed: int, n: int = n, m: int = m) -> Drawn:
            found = difference(rng.standard_normal(n), 2 * rng.standard_normal(m), seed=seed)
            return found.estimate, found.p

        yield Row("difference of means, spreads 1 and 2", f"{n} and {m} prompts", 0.0, normal, null=True)


def _auroc() -> Iterator[Row]:
    for truth in (0.5, 0.8, 0.993):
        for n in (8, 16, 32, 64):

            def draw(rng: np.random.Generator, seed: int, n: int = n, truth: float = truth) -> Drawn:
                apart = math.sqrt(2) * scipy_stats.norm.ppf(truth)
                return auroc(rng.standard_normal(n) + apart, rng.standard_normal(n), seed=seed), math.nan

            yield Row(f"AUROC of {truth:g}", f"{n} a class", truth, draw, (0.0, 1.0))
    for questions in (8, 16):

        def clustered(rng: np.random.Generator, seed: int, questions: int = questions) -> Drawn:
            groups = [np.repeat(np.arange(questions) + start, 6).tolist() for start in (0, 1000)]
            x, y = (
                np.sqrt(0.5) * (np.repeat(rng.standard_normal(questions), 6) + rng.standard_normal(6 * questions))
                for _ in range(2)
            )
            apart = math.sqrt(2) * scipy_stats.norm.ppf(0.9)
            return auroc(x + apart, y, groups=groups, seed=seed), math.nan

        yield Row("AUROC of 0.9, clustered (.5)", f"{questions} questions x 6 a class", 0.9, clustered, (0.0, 1.0))


def _over_seeds() -> Iterator[Row]:
    for a, b in ((2.0, 2.0), (9.0, 1.0), (1.0, 19.0)):
        for n in (3, 5, 8):

            def draw(rng: np.random.Generator, seed: int, n: int = n, a: float = a, b: float = b) -> Drawn:
                return mean_over_units(rng.beta(a, b, n), range(n), bounds=(0.0, 1.0)), math.nan

            yield Row(f"rate over seeds, Beta({a:g}, {b:g})", f"{n} seeds", a / (a + b), draw, (0.0, 1.0))
