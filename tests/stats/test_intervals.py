"""The bootstrap of any statistic agrees with a mean's known law, and its p with its interval."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tl_em import stats
from tl_em.errors import UsageError
from tl_em.stats.intervals import _draw, bootstrap, p_of_tail, tails, vector
from tl_em.stats.units import units_of

X = np.random.default_rng(0).normal(0.5, 1, 60)


def of_mean(x: np.ndarray):
    return lambda w: w @ x / w.sum(-1)


@pytest.mark.parametrize("units", [2, 5, 30, 1000])
def test_the_ends_are_hesterbergs_and_p_is_their_inverse(units: int) -> None:
    for level in (0.9, 0.95):
        low, high = tails(units, level)
        reach = scipy_stats.t.ppf((1 + level) / 2, units - 1) * math.sqrt(units / (units - 1))
        assert scipy_stats.norm.isf(low) == pytest.approx(reach)
        assert low + high == pytest.approx(1)
        assert p_of_tail(low, units) == pytest.approx(1 - level)
    assert tails(units) == tails(units, 0.95)
    assert p_of_tail(0.5, units) == p_of_tail(0.8, units) == 1.0


def test_a_means_percentile_interval_is_a_normals_at_these_ends() -> None:
    e = stats.bootstrap(of_mean(X), [60]).estimate
    reach = scipy_stats.norm.isf(tails(60)[0]) * X.std() / math.sqrt(60)
    assert e.value == pytest.approx(X.mean())
    assert (e.low, e.high) == pytest.approx((X.mean() - reach, X.mean() + reach), abs=0.12 * reach)
    assert (e.n, e.n_effective, e.seed, e.method) == (60, 60.0, 0, "bootstrap, 2000 draws, percentile")


@pytest.mark.parametrize("side", [1, -1])
def test_p_of_any_value_is_about_a_normals_near_and_far(side: int) -> None:
    """Far away no draw lies beyond: then the tail of a normal of their spread goes on."""
    found = stats.bootstrap(of_mean(side * X), [60])
    error = X.std() / math.sqrt(60)
    assert found.at is not None and found.p == found.at(0.0)
    assert found.at(side * X.mean()) > 0.9
    for steps, within in ((1, 0.1), (2, 0.2), (6, 0.8)):
        for way in (1, -1):
            reach = steps * error
            expected = 2 * scipy_stats.t.sf(steps / math.sqrt(60 / 59), 59)
            assert found.at(side * X.mean() + way * reach) == pytest.approx(expected, rel=within)
    assert found.at(side * X.mean() + 30 * error) < 1e-20


def test_a_value_beside_the_draws_of_what_does_not_vary_is_as_rare_as_draws_allow() -> None:
    found = stats.bootstrap(lambda w: 2.0 + 0 * w.sum(-1), [9], resamples=199)
    assert found.estimate.low == found.estimate.high == 2.0
    assert found.at is not None and found.at(2.0) == 1.0
    assert found.at(1.0) == found.at(3.0) == pytest.approx(p_of_tail(1 / 200, 9))


def test_prompts_that_are_repeated_add_nothing() -> None:
    labels = np.repeat(np.arange(60), 3).tolist()
    once, again = stats.bootstrap(of_mean(X), [60]), stats.bootstrap(of_mean(np.repeat(X, 3)), [labels])
    a, b = once.estimate, again.estimate
    assert (b.value, b.low, b.high, again.p) == pytest.approx((a.value, a.low, a.high, once.p))
    assert (b.n, b.n_effective) == (180, pytest.approx(60, rel=1e-3))
    assert b.method == "question-clustered bootstrap, 2000 draws, percentile"


def test_samples_are_drawn_apart_and_those_of_the_same_questions_together() -> None:
    """Each sample has its own error; the wider of the two laws is that of the smaller sample."""
    y = np.random.default_rng(1).normal(0, 2, 30)

    def gap(w: np.ndarray, v: np.ndarray) -> np.ndarray:
        return w @ X / w.sum(-1) - v @ y / v.sum(-1)

    e = stats.bootstrap(gap, [60, 30]).estimate
    reach = scipy_stats.norm.isf(tails(30)[0]) * math.hypot(X.std() / math.sqrt(60), y.std() / math.sqrt(30))
    assert (e.low, e.high) == pytest.approx((e.value - reach, e.value + reach), abs=0.12 * reach)
    assert e.n == 90
    labels = [str(i) for i in range(60)]
    same = stats.bootstrap(lambda w, v: w @ X / w.sum(-1) - v @ (X + 1) / v.sum(-1), [labels, labels]).estimate
    assert (same.low, same.high) == pytest.approx((-1, -1))


def test_the_smaller_sample_says_how_far_the_ends_lie() -> None:
    y = np.random.default_rng(1).normal(0, 2, 4)

    def gap(w: np.ndarray, v: np.ndarray) -> np.ndarray:
        return v @ y / v.sum(-1) - 0.01 * w @ X / w.sum(-1)

    found = stats.bootstrap(gap, [60, 4])
    draws = y[np.random.default_rng(2).integers(0, 4, (4000, 4))].mean(1)
    low, high = np.quantile(draws, tails(4)) - 0.01 * X.mean()
    assert (found.estimate.low, found.estimate.high) == pytest.approx((low, high), abs=0.1)
    assert abs(np.quantile(draws, tails(60)[0]) - 0.01 * X.mean() - low) > 0.2
    assert found.at is not None and 0.03 < found.at(found.estimate.low) < 0.09  # of 60 units, it would be .002
    none = stats.bootstrap(gap, [60, ["a"] * 4])  # where either has one unit
    assert math.isnan(none.p) and math.isnan(none.estimate.low)


def test_a_warning_of_the_statistics_own_is_heard() -> None:
    def loud(w: np.ndarray) -> np.ndarray:
        if (w != 1).any():  # of the draws, not of the sample
            warnings.warn("mine", stacklevel=1)
        return w @ X / w.sum(-1)

    with pytest.warns(UserWarning, match="mine"):
        stats.bootstrap(loud, [60], resamples=10)


def test_draws_and_seed_are_what_is_asked() -> None:
    few = stats.bootstrap(of_mean(X), [60], resamples=300, seed=5)
    assert few.estimate.method == "bootstrap, 300 draws, percentile" and few.estimate.seed == 5
    assert few.estimate == stats.bootstrap(of_mean(X), [60], resamples=300, seed=5).estimate
    assert few.estimate.low != stats.bootstrap(of_mean(X), [60], resamples=300, seed=6).estimate.low


def test_draws_without_a_value_are_left_out() -> None:
    """A ratio that a resample cannot give (no prompt of one kind in it) is no draw."""
    kind = np.array([1.0] + [0.0] * 7)

    def ratio(w: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (w @ (kind * X[:8])) / (w @ kind)

    e = stats.bootstrap(ratio, [8]).estimate
    assert e.low == e.high == pytest.approx(X[0])


def test_one_unit_has_no_interval() -> None:
    for sample in (1, ["a", "a", "a"]):
        n = 1 if sample == 1 else 3
        found = stats.bootstrap(of_mean(X[:n]), [sample])
        assert math.isnan(found.estimate.low) and math.isnan(found.estimate.high) and math.isnan(found.p)
        assert found.estimate.value == pytest.approx(X[:n].mean()) and found.at is None and found.estimate.seed == 0
    assert math.isfinite(stats.bootstrap(of_mean(X[:2]), [2]).estimate.low)


def test_a_vector_is_finite_numbers_of_one_axis() -> None:
    assert vector([1, True, 0]).tolist() == [1.0, 1.0, 0.0] and vector([1]).dtype == float
    for wrong in ([[1.0]], [1.0, np.inf], 3.0 * np.eye(2)):
        with pytest.raises(UsageError, match="one finite number"):
            vector(wrong)


def test_the_default_draws_and_seed_are_on_record() -> None:
    def statistic(w: np.ndarray) -> np.ndarray:
        return w @ np.arange(10.0) / w.sum(-1)

    found = bootstrap(statistic, [10])
    assert "2000 draws" in found.estimate.method and found.estimate.seed == 0
    assert bootstrap(statistic, [10], seed=1).estimate.low != found.estimate.low
    alone = bootstrap(lambda w: w[:, 0], [1], seed=3).estimate
    assert np.isnan(alone.low) and alone.seed == 3


def test_the_smaller_sample_decides_how_wide_it_is() -> None:
    def gap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a @ np.arange(float(a.shape[1])) / a.sum(-1) - b @ np.arange(40.0) / b.sum(-1)

    both = bootstrap(gap, [3, 40])
    drawn_wide, usual = tails(3), tails(40)
    assert drawn_wide[0] < usual[0]
    assert both.estimate.low == pytest.approx(gap_quantile(gap, drawn_wide[0]), abs=1e-9)
    assert np.isnan(bootstrap(gap, [1, 40]).estimate.low)


def gap_quantile(statistic: Any, share: float) -> float:
    units = units_of([3, 40])
    return float(np.quantile(_draw(statistic, units, seed=0, resamples=2000), share))


def test_a_share_above_one_half_has_a_p_of_one() -> None:
    assert p_of_tail(0.5, 9) == pytest.approx(1.0)
    assert p_of_tail(0.8, 9) == pytest.approx(1.0)
