"""AUROC has DeLong's error and Newcombe's interval, each by its textbook form, and repeated prompts add nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tl_em import stats
from tl_em.stats.ranks import share_above

Z = scipy_stats.norm.ppf(0.975)
RNG = np.random.default_rng(0)
HIGH, LOW = RNG.normal(0.8, 1, 14), RNG.normal(size=9)


def newcombe(value: float, n: float, m: float) -> tuple[float, float]:
    """The t at which |t - a| <= z sqrt(V(t)), on a grid (Newcombe 2006, method 5, as printed)."""
    t = np.linspace(0, 1, 200_001)
    star = (n + m) / 2 - 1
    variance = t * (1 - t) * (1 + star * (1 - t) / (2 - t) + star * t / (1 + t)) / (n * m)
    inside = t[np.abs(t - value) <= Z * np.sqrt(variance) + 1e-12]
    return float(inside.min()), float(inside.max())


def delong(high: np.ndarray, low: np.ndarray) -> tuple[float, float]:
    """DeLong's error as printed, Satterthwaite's degrees of freedom, on the logit scale."""
    above = np.array([[float(x > y) + 0.5 * float(x == y) for y in low] for x in high])
    value, parts = above.mean(), [above.mean(1).var(ddof=1) / len(high), above.mean(0).var(ddof=1) / len(low)]
    df = sum(parts) ** 2 / (parts[0] ** 2 / (len(high) - 1) + parts[1] ** 2 / (len(low) - 1))
    half = scipy_stats.t.ppf(0.975, df) * math.sqrt(sum(parts)) / (value * (1 - value))
    ends = [1 / (1 + math.exp(-(math.log(value / (1 - value)) + side * half))) for side in (-1, 1)]
    return ends[0], ends[1]


@pytest.mark.parametrize(("high", "low"), [(HIGH, LOW), (HIGH.round(), LOW.round()), (LOW, HIGH), (3 + HIGH[:4], LOW)])
def test_the_interval_is_the_wider_of_delongs_and_newcombes(high: np.ndarray, low: np.ndarray) -> None:
    e = stats.auroc(high, low)
    u = scipy_stats.mannwhitneyu(high, low).statistic / (len(high) * len(low))
    assert e.value == pytest.approx(u)
    ends = np.array([newcombe(u, len(high), len(low)), *([delong(high, low)] if 0 < u < 1 else [])])
    assert (e.low, e.high) == pytest.approx((ends[:, 0].min(), ends[:, 1].max()), abs=2e-5)
    assert (e.n, e.n_effective) == (len(high) + len(low), len(high) + len(low))
    assert e.method == "DeLong on the logit scale and Newcombe's, wider ends"


@pytest.mark.parametrize(("n", "m"), [(4, 30), (20, 20)])
def test_classes_that_never_overlap_have_newcombes_interval(n: int, m: int) -> None:
    e = stats.auroc(np.arange(n) + 100.0, np.arange(m) + 0.0)
    assert (e.low, e.high) == pytest.approx(newcombe(1.0, n, m), abs=2e-5)
    turned = stats.auroc(np.arange(m) + 0.0, np.arange(n) + 100.0)
    assert (turned.low, turned.high) == pytest.approx(newcombe(0.0, m, n), abs=2e-5)


def test_one_alike_counts_half() -> None:
    assert share_above(np.array([1.0, 2.0]), np.array([1.0, 0.0, 3.0])).tolist() == [[0.5, 1, 0], [1, 1, 0]]


def test_prompts_that_are_repeated_add_nothing() -> None:
    labels = [f"{name}{i}" for name, x in (("h", HIGH), ("l", LOW)) for i in range(len(x))]
    groups = [np.repeat(labels[: len(HIGH)], 3).tolist(), np.repeat(labels[len(HIGH) :], 3).tolist()]
    once, again = stats.auroc(HIGH, LOW), stats.auroc(np.repeat(HIGH, 3), np.repeat(LOW, 3), groups=groups)
    assert (again.value, again.low, again.high) == pytest.approx((once.value, once.low, once.high))
    assert (again.n, again.n_effective) == (3 * once.n, pytest.approx(once.n))
    assert again.method.startswith("question-clustered, ")


def test_questions_of_both_classes_cancel_what_they_share() -> None:
    """The same questions in both classes: what lifts both scores of one does not make the share unsure."""
    effect = np.random.default_rng(1).normal(0, 3, 40)
    x, y = effect + 1.5 + 0.1 * RNG.normal(size=40), effect
    labels = [str(i) for i in range(40)]
    joint = stats.auroc(x, y, groups=[labels, labels])
    apart = stats.auroc(x, y, groups=[labels, [f"other {label}" for label in labels]])
    assert apart == stats.auroc(x, y).__class__(**{**vars(stats.auroc(x, y)), "method": apart.method})
    assert joint.value == apart.value and joint.low >= apart.low and joint.high <= apart.high


def test_the_other_way_round_it_is_the_rest() -> None:
    """Also where only some of the questions are in both classes."""
    first, second = [str(i) for i in range(14)], [str(i) for i in range(8, 17)]
    one, turned = stats.auroc(HIGH, LOW, groups=[first, second]), stats.auroc(LOW, HIGH, groups=[second, first])
    assert (turned.value, turned.low, turned.high) == pytest.approx((1 - one.value, 1 - one.high, 1 - one.low))
    assert one.low < one.value < one.high


def test_pairs_weigh_what_they_are_given() -> None:
    pairs = np.zeros((len(HIGH), len(LOW)))
    pairs[:9] = np.eye(9)
    above = share_above(HIGH, LOW)
    assert stats.auroc(HIGH, LOW, pairs=pairs).value == pytest.approx(np.mean([above[i, i] for i in range(9)]))
    same, *scaled = (stats.auroc(HIGH, LOW, pairs=k * np.ones_like(pairs)) for k in (1.0, 2.0, 1e-3))
    assert same == stats.auroc(HIGH, LOW)
    for each in scaled:
        assert (each.value, each.low, each.high) == pytest.approx((same.value, same.low, same.high))
    none = stats.auroc(HIGH, LOW, pairs=0 * pairs)
    assert none.value == 0.5 and none.low < 0.3


def test_one_question_has_no_interval() -> None:
    e = stats.auroc(HIGH, LOW, groups=[["a"] * len(HIGH), ["b"] * len(LOW)])
    assert math.isnan(e.low) and math.isnan(e.high) and "fewer than two units" in e.method
    assert math.isnan(stats.auroc(HIGH[:1], LOW).low) and math.isfinite(stats.auroc(HIGH[:2], LOW).low)
    assert e.n_effective == e.n == 23


def test_each_labelling_may_have_scores_of_its_own() -> None:
    scores, labels = np.array([[3.0, 1.0, 2.0], [10.0, 30.0, 20.0]]), np.array([[True, False, False]] * 2)
    assert stats.auroc_of(scores, labels).tolist() == [1.0, 0.0]
