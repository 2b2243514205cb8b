"""Rates have the intervals of their sources: checked against statsmodels, or against what defines them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special
from scipy import stats as scipy_stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from tl_em import stats
from tl_em.stats.rates import beta_interval, binary, bounded_mean, paired_rates, two_rates

Z = scipy_stats.norm.ppf(0.975)


@pytest.mark.parametrize(("hits", "n"), [(0, 9), (1, 9), (4, 9), (8, 9), (9, 9)])
def test_a_rate_has_clopper_and_pearsons_interval(hits: int, n: int) -> None:
    expected = np.nan_to_num(proportion_confint(hits, n, method="beta"), nan=hits / n)
    assert beta_interval(hits, n) == pytest.approx(tuple(expected))
    x = np.arange(n) < hits
    e = stats.mean(x.astype(float))
    assert (e.low, e.high, e.n, e.n_effective) == pytest.approx((*expected, n, n))
    assert e.method == "exact (Clopper and Pearson)"


def test_answers_that_are_no_whole_number_end_where_the_tails_do() -> None:
    low, high = beta_interval(2.5, 7.5)
    assert special.betainc(2.5, 6.0, low) == pytest.approx(0.025)
    assert special.betaincc(3.5, 5.0, high) == pytest.approx(0.025)
    assert beta_interval(-1e-9, 5)[0] == 0.0 and beta_interval(5 + 1e-9, 5)[1] == 1.0


def test_all_values_of_all_samples_are_looked_at() -> None:
    zero, one, half = np.zeros(3), np.ones(3), np.array([0.0, 0.5, 1.0])
    assert binary(zero, one) and not binary(zero, half) and not binary(half)
    assert not binary(np.array([2.0, 2.0]))


def test_an_outcome_of_two_values_is_a_rate_in_its_own_units() -> None:
    x = np.array([-3.0, 5.0, 5.0, -3.0, 5.0, 5.0, 5.0, -3.0, 5.0])
    e = stats.mean(x, bounds=(-3, 5))
    low, high = proportion_confint(6, 9, method="beta")
    assert (e.value, e.low, e.high) == pytest.approx((x.mean(), -3 + 8 * low, -3 + 8 * high))
    assert e.method == "exact (Clopper and Pearson)"


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 3.0)])
def test_a_probability_counts_for_the_answers_that_would_vary_as_much(bounds: tuple[float, float]) -> None:
    """Korn and Graubard: m (1 - m) / var, times (z / t)^2 for the few units, in the outcome's own units."""
    x = np.array([0.1, 0.3, 0.2, 0.7, 0.4])
    span = bounds[1] - bounds[0]
    variance = x.var(ddof=1) / 5
    m = (x.mean() - bounds[0]) / span
    n = m * (1 - m) / (variance / span**2) * (Z / scipy_stats.t.ppf(0.975, 4)) ** 2
    ends = bounds[0] + span * np.array(proportion_confint(m * n, n, method="beta"))
    e = bounded_mean(x, variance, 5, bounds, worth=5, method="said: ")
    assert (e.value, e.low, e.high, e.n, e.n_effective) == pytest.approx((x.mean(), *ends, 5, 5))
    assert e.method.startswith("said: ") and "Korn and Graubard" in e.method
    assert stats.mean(x, bounds=bounds).low == pytest.approx(ends[0])  # too few units to know of skewness


def test_a_variance_that_cannot_be_seen_counts_every_unit_once() -> None:
    for value, units in ((0.25, 6), (0.0, 6), (1.0, 6)):
        e = bounded_mean(np.full(12, value), 0.0, units, (0.0, 1.0), worth=6)
        expected = np.nan_to_num(proportion_confint(value * units, units, method="beta"), nan=value)
        assert (e.low, e.high) == pytest.approx(tuple(expected))
        assert "every unit once" in e.method
    nearly = bounded_mean(np.full(12, 0.25), 1e-14, 6, (0.0, 1.0), worth=6)  # rounding, no variance
    assert "every unit once" in nearly.method


def test_the_change_of_a_rate_is_bonett_and_prices() -> None:
    """6 of 10 change up and 1 down: one of either is added."""
    before = np.array([0, 0, 0, 0, 0, 0, 1, 1, 0, 0.0])
    after = np.array([1, 1, 1, 1, 1, 1, 0, 1, 0, 0.0])
    up, down = 7 / 12, 2 / 12
    error = np.sqrt((up + down - (up - down) ** 2) / 12)
    found = paired_rates(before, after, None)
    e = found.estimate
    assert (e.value, e.low, e.high) == pytest.approx((0.5, up - down - Z * error, up - down + Z * error))
    assert (e.n, e.n_effective) == (10, 10.0)
    assert found.p == pytest.approx(2 * scipy_stats.norm.sf((up - down) / error))
    assert found.at(0.2) == pytest.approx(2 * scipy_stats.norm.sf((up - down - 0.2) / error))
    assert found.at(0.6) == pytest.approx(2 * scipy_stats.norm.sf((0.6 - up + down) / error))
    turned = paired_rates(after, before, None).estimate
    assert (turned.value, turned.low, turned.high) == pytest.approx((-0.5, -e.high, -e.low))


def test_the_difference_of_two_rates_is_agresti_and_caffos() -> None:
    first, second = np.array([1.0] * 3 + [0.0] * 9), np.array([1.0] * 14 + [0.0] * 6)
    low, high = confint_proportions_2indep(14, 20, 3, 12, method="agresti-caffo", compare="diff")
    found = two_rates(first, second, None)
    e = found.estimate
    assert (e.value, e.low, e.high) == pytest.approx((0.7 - 0.25, low, high))
    assert (e.n, e.n_effective) == (32, 32.0)
    assert [found.at(low), found.at(high)] == pytest.approx([0.05, 0.05])
    assert stats.difference(first, second).estimate == e


@pytest.mark.parametrize("times", [2, 5])
def test_answers_that_are_repeated_add_nothing(times: int) -> None:
    """A question that is asked five times with the same answer counts once."""
    rng = np.random.default_rng(0)
    before, after = (rng.random(14) < 0.3).astype(float), (rng.random(14) < 0.7).astype(float)
    labels = np.repeat(np.arange(14), times).tolist()
    other = [f"other {label}" for label in labels]
    many = [np.repeat(x, times) for x in (before, after)]
    for once, again in (
        (paired_rates(before, after, None), paired_rates(*many, labels)),
        (two_rates(before, after, None), two_rates(*many, (labels, other))),
    ):
        a, b = once.estimate, again.estimate
        assert (b.value, b.low, b.high, b.n_effective, again.p) == pytest.approx(
            (a.value, a.low, a.high, a.n_effective, once.p)
        )
        assert b.n == times * a.n


def test_ends_stay_in_range_and_hold_the_value() -> None:
    """The adjusted centre is drawn towards 0, so that a change of all would lie outside of its interval."""
    found = paired_rates(np.zeros(3), np.ones(3), None).estimate
    assert found.value == found.high == 1.0 and found.low < 0.5
    down = two_rates(np.ones(3), np.zeros(3), None).estimate
    assert down.value == down.low == -1.0 and down.high > -0.6
    wide = paired_rates(np.array([0.0, 1.0]), np.array([1.0, 0.0]), None).estimate
    assert wide.low >= -1 and wide.high <= 1
