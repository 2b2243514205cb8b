"""Means and differences have Student's interval or the wider studentised one, in every arrangement of units."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tl_em import stats
from tl_em.errors import UsageError
from tl_em.stats.intervals import p_of_tail, tails
from tl_em.stats.means import (
    FARTHEST,
    FEWEST,
    RESAMPLES,
    _parts,
    _studentised,
    difference,
    mean,
    mean_over_units,
    paired_difference,
)

RNG = np.random.default_rng(0)
SKEWED, OTHER = np.exp(RNG.normal(size=24)), np.exp(RNG.normal(size=15)) + 0.5


def repeated(x: np.ndarray, times: int = 3) -> tuple[np.ndarray, list[str]]:
    return np.repeat(x, times), np.repeat([f"{len(x)} {i}" for i in range(len(x))], times).tolist()


def test_a_few_prompts_have_students_and_welchs_interval() -> None:
    x, y = SKEWED[: FEWEST - 1], OTHER[:5]
    one = scipy_stats.ttest_1samp(x, 0.3)
    e = stats.mean(x)
    assert (e.low, e.high) == pytest.approx(tuple(one.confidence_interval()))
    assert (e.n, e.n_effective, e.method, e.seed) == (7, 7.0, "Student's t", 0)
    assert stats.mean(x[:2]).low == pytest.approx(scipy_stats.ttest_1samp(x[:2], 0).confidence_interval().low)
    paired = stats.paired_difference(np.zeros(7), x)
    assert paired.at is not None and paired.at(0.3) == pytest.approx(one.pvalue) and paired.estimate.seed == 0
    welch = scipy_stats.ttest_ind(x, y, equal_var=False)
    found = stats.difference(y, x)
    assert (found.estimate.low, found.estimate.high) == pytest.approx(tuple(welch.confidence_interval()))
    assert found.p == pytest.approx(welch.pvalue) and found.estimate.seed == 0
    assert found.estimate.value == pytest.approx(x.mean() - y.mean()) and found.estimate.n == 12


@pytest.mark.parametrize("side", [1, -1])
def test_from_eight_on_the_studentised_end_counts_where_it_is_wider(side: int) -> None:
    """(m* - m) / se* by a loop over resamples of its own; the end on the long tail's side is the resampled one."""
    x, n = side * SKEWED, len(SKEWED)
    drawn = x[np.random.default_rng(7).integers(0, n, (20_000, n))]
    ratios = (drawn.mean(1) - x.mean()) / (drawn.std(1, ddof=1) / math.sqrt(n))
    error = x.std(ddof=1) / math.sqrt(n)
    low, high = np.quantile(ratios, tails(n))
    reach = scipy_stats.t.ppf(0.975, n - 1)
    e = stats.mean(x)
    ends = ((x.mean() - e.low) / error, (e.high - x.mean()) / error)
    assert ends == pytest.approx((max(reach, high), max(reach, -low)), rel=0.12)
    assert max(ends) > 1.2 * reach and min(ends) == pytest.approx(reach)
    assert e.method == "Student's t and studentised bootstrap, 2000 draws, the wider ends"
    assert "bootstrap" in stats.mean(x[:FEWEST]).method and "bootstrap" not in stats.mean(x[: FEWEST - 1]).method


@pytest.mark.parametrize("apart", [0, 9])
@pytest.mark.parametrize("side", [1, -1])
def test_it_is_followed_to_twice_students_reach(side: int, apart: int) -> None:
    """Nine alike and one apart: resamples without it hardly vary, so their ratios grow without end."""
    x = side * np.insert([0.0, 1e-6, 2e-6, 1e-6, 0.0, 3e-6, 1e-6, 2e-6, 0.0], apart, 1.0)
    reach = scipy_stats.t.ppf(0.975, 9) * x.std(ddof=1) / math.sqrt(10)
    found = stats.paired_difference(np.zeros(10), x)
    ends = sorted((abs(found.estimate.low - x.mean()), abs(found.estimate.high - x.mean())))
    assert ends == pytest.approx([reach, FARTHEST * reach])
    assert found.at is not None
    for steps in (1.5, 2.5, 4):
        p = found.at(x.mean() + side * steps * reach)
        assert p <= 2 * scipy_stats.t.sf(steps * scipy_stats.t.ppf(0.975, 9) / FARTHEST, 9) + 1e-12
        assert (p < 0.05) == (steps > 2)


def test_p_is_the_share_of_resamples_beyond_or_students_whichever_is_more() -> None:
    found, n = stats.paired_difference(np.zeros(24), SKEWED), 24
    error = SKEWED.std(ddof=1) / math.sqrt(n)
    ratios = _studentised(_parts([SKEWED], [1], [None]), 0)
    assert len(ratios) == RESAMPLES
    assert found.at is not None
    for steps in (-2.5, -1.0, -0.2, 0.2, 1.0, 2.5):
        share = np.mean(ratios >= steps) if steps > 0 else np.mean(ratios <= steps)
        expected = max(2 * scipy_stats.t.sf(abs(steps), n - 1), p_of_tail(float(share), n))
        assert found.at(SKEWED.mean() - steps * error) == pytest.approx(expected)
    assert found.at(SKEWED.mean()) == 1.0
    assert found.at(SKEWED.mean() - 40 * error) == pytest.approx(2 * scipy_stats.t.sf(40, n - 1))
    assert found.p == found.at(0.0)


def test_the_smaller_set_says_where_the_studentised_ends_are() -> None:
    many = np.exp(np.random.default_rng(5).normal(size=60))
    e = stats.difference(many, SKEWED[:9]).estimate
    ratios = _studentised(_parts([many, SKEWED[:9]], [-1, 1], [None, None]), 0)
    error = math.hypot(many.std(ddof=1) / math.sqrt(60), SKEWED[:9].std(ddof=1) / 3)
    low, high = np.quantile(ratios, tails(9))
    welch = scipy_stats.ttest_ind(SKEWED[:9], many, equal_var=False).confidence_interval()
    assert e.low == pytest.approx(
        min(welch.low, max(e.value - high * error, e.value - FARTHEST * (e.value - welch.low)))
    )
    assert e.high == pytest.approx(
        max(welch.high, min(e.value - low * error, e.value + FARTHEST * (welch.high - e.value)))
    )
    assert min(e.low - welch.low, welch.high - e.high) < -0.01


def test_resamples_that_do_not_vary_are_left_out() -> None:
    e = stats.mean([0.0] * 6 + [1.0, -1.0])  # a tenth of them are zeros only
    assert e.low < -0.3 and e.high > 0.3
    assert len(_studentised(_parts([np.array([0.0] * 6 + [1.0, -1.0])], [1], [None]), 0)) < 0.95 * RESAMPLES


def test_each_unit_is_drawn_as_often_as_any_other() -> None:
    """Of 8 units one is in a resample with 1 - (7 / 8)^8, and only such a resample varies here."""
    expected = RESAMPLES * (1 - (7 / 8) ** 8)
    for one in (0, 3, 7):
        drawn = _studentised(_parts([np.eye(8)[one]], [1], [None]), 0)
        assert abs(len(drawn) - expected) < 5 * math.sqrt(expected)


def test_the_sum_at_weights_is_that_of_the_sample_repeated_so_often() -> None:
    """Of two samples that share some of their questions, and of one: [2 resamples, unit] weights."""
    first, second = ["a", "a", "b", "c", "d"], ["b", "c", "c", "e"]
    x, y = RNG.normal(size=5), RNG.normal(size=4)
    parts = _parts([x, y], [-1, 1], [first, second])
    assert parts.sizes == [5] and parts.value == pytest.approx(y.mean() - x.mean())
    weights = np.array([[1.0, 1, 1, 1, 1], [2, 0, 1, 1, 1], [1, 2, 1, 0, 1]])
    values, variances = parts.at([weights])
    assert variances.shape == (1, 3)
    for w, value, variance in zip(weights, values, variances[0], strict=True):
        copies = [
            np.repeat(z, [int(w["abcde".index(label)]) for label in labels]) for z, labels in ((x, first), (y, second))
        ]
        assert value == pytest.approx(copies[1].mean() - copies[0].mean())
        added = np.zeros(5)
        for z, labels, sign, drawn in ((x, first, -1, copies[0]), (y, second, 1, copies[1])):
            for each, label in zip(z, labels, strict=True):
                added["abcde".index(label)] += sign * (each - drawn.mean()) / len(drawn)
        assert variance == pytest.approx(5 / 4 * float(w @ added**2))
    assert parts.variances == pytest.approx(variances_at_one(parts))


def variances_at_one(parts) -> np.ndarray:
    return parts.at([np.ones((1, size)) for size in parts.sizes])[1][:, 0]


@pytest.mark.parametrize("n", [5, 24])
def test_prompts_that_are_repeated_add_nothing(n: int) -> None:
    x, y, z = SKEWED[:n], OTHER[:n], np.sqrt(OTHER[:n])
    (many, labels), (others, names) = repeated(x), repeated(y)
    names = [f"other {name}" for name in names]
    pairs = [
        (
            stats.paired_difference(z[:5], x[:5]),
            stats.paired_difference(np.repeat(z[:5], 3), many[:15], groups=labels[:15]),
        ),
        (stats.difference(x, y), stats.difference(many, others, groups=(labels, names))),
    ]
    for once, again in pairs:
        a, b = once.estimate, again.estimate
        assert (b.value, b.low, b.high, again.p) == pytest.approx((a.value, a.low, a.high, once.p))
        assert (b.n, b.n_effective) == (3 * a.n, pytest.approx(a.n_effective))
        assert b.method == f"question-clustered {a.method}"
    a, b = stats.mean(x), stats.mean(many, groups=labels)
    assert (b.value, b.low, b.high, b.n_effective) == pytest.approx((a.value, a.low, a.high, a.n_effective))
    a, b = (stats.mean(v / 20, bounds=(0, 1), groups=g) for v, g in ((x, None), (many, labels)))
    assert (b.value, b.low, b.high, b.n_effective) == pytest.approx((a.value, a.low, a.high, n))
    assert b.method.startswith("question-clustered, ")


@pytest.mark.parametrize("n", [6, 15])
def test_the_same_questions_in_both_classes_are_pairs(n: int) -> None:
    labels = [str(i) for i in range(n)]
    joint = stats.difference(SKEWED[:n], OTHER[:n], groups=(labels, labels))
    paired = stats.paired_difference(SKEWED[:n], OTHER[:n])
    assert (joint.estimate.low, joint.estimate.high, joint.p) == pytest.approx(
        (paired.estimate.low, paired.estimate.high, paired.p)
    )
    assert joint.estimate.value == pytest.approx(paired.estimate.value)
    coin = (SKEWED[:n] > 1).astype(float), (OTHER[:n] > 1.5).astype(float)
    shared = stats.difference(*coin, groups=(labels, labels)).estimate  # no two independent rates
    assert "Agresti" not in shared.method
    assert "Agresti" in stats.difference(*coin, groups=(labels, [f"other {x}" for x in labels])).estimate.method


def test_a_group_that_lies_in_both_sets_counts_where_others_do_not() -> None:
    """One question of several in common is enough for one stratum."""
    x, y = SKEWED[:6], OTHER[:6]
    some = stats.difference(x, y, groups=(list("abcdef"), list("fghijk"))).estimate
    none = stats.difference(x, y, groups=(list("abcdef"), list("lghijk"))).estimate
    assert some.value == none.value and some.low != none.low


def test_an_outcome_that_does_not_vary_has_its_value_for_ends() -> None:
    found = stats.paired_difference(np.arange(9.0), np.arange(9.0) + 0.3)
    e = found.estimate
    assert e.low == e.high == e.value == pytest.approx(0.3)
    assert found.p == 0.0 and found.at is not None and found.at(e.value) == 1.0 and found.at(0.2) == 0.0
    assert "does not vary" in e.method and e.seed == 0
    noise = (np.arange(7) + 0.1) - np.arange(7)  # of the last digits
    groups = ["a", "a", "b", "b", "c", "c"]  # which vary within, and are alike
    alike = stats.mean([0.0, 0.3, 0.3, 0.0, 0.1 + 0.2, 0.0], groups=groups)
    for each in (stats.difference(noise, np.zeros(7)).estimate, stats.difference(np.zeros(7), noise).estimate, alike):
        assert each.low == each.high == each.value
    assert stats.paired_difference(np.arange(9.0), np.arange(9.0)).p == 1.0
    tiny = stats.mean(1e-9 * SKEWED)  # small is not the same as constant
    assert tiny.high > 1.1 * tiny.value


def test_a_bounded_mean_has_the_wider_of_both_shapes_within_its_range() -> None:
    x = np.clip(SKEWED / 12, 0, 1)
    e, skewed = stats.mean(x, bounds=(0, 1), seed=2), stats.mean(x, seed=2)
    beta = stats.mean_over_units(x, list(range(24)), bounds=(0, 1))
    assert (e.low, e.high) == pytest.approx((min(beta.low, skewed.low), max(beta.high, skewed.high)))
    assert e.high == skewed.high > beta.high and "studentised" in e.method and "Korn" in e.method and e.seed == 2
    few = stats.mean(x[:7], bounds=(0, 1))
    assert few.high == pytest.approx(stats.mean_over_units(x[:7], list(range(7)), bounds=(0, 1)).high, rel=1e-12)
    assert "studentised" in stats.mean(x[:8], bounds=(0, 1)).method and "studentised" not in few.method
    near = stats.mean(1 - np.clip(SKEWED / 400, 0, 1), bounds=(0, 1))
    assert near.high <= 1
    scaled = stats.mean(10 * x - 5, bounds=(-5, 5), seed=2)
    assert (scaled.low, scaled.high) == pytest.approx((10 * e.low - 5, 10 * e.high - 5))
    assert "exact" in stats.mean(np.array([0.0, 10.0] * 5), bounds=(0, 10)).method


def test_bounds_hold_the_values_and_are_in_order() -> None:
    for bounds in ((0, 0.9), (0.2, 1), (1, 0), (0.5, 0.5)):
        with pytest.raises(UsageError, match="do not lie in bounds"):
            stats.mean([0.1, 0.5, 1.0], bounds=bounds)
    with pytest.raises(UsageError, match="do not lie in bounds"):
        stats.mean([0.5, 0.5], bounds=(0.5, 0.5))
    assert stats.mean([0.1, 0.5, 1.0 + 1e-9], bounds=(0.1, 1)).value > 0.5  # rounding
    with pytest.raises(UsageError, match="do not lie in bounds"):
        stats.mean_over_units([0.1, 0.5, 1.2], [1, 2, 3], bounds=(0, 1))


def test_one_unit_has_no_interval_and_one_answer_has() -> None:
    for two in (stats.mean([1.0, 0.0], groups=["a", "b"]), stats.mean([1.0, 0.0, 0.0], groups=["a", "b", "b"])):
        assert 0 <= two.low < two.high <= 1
    assert math.isfinite(stats.mean_over_units([0.2, 0.4], [1, 2]).low)
    coin = stats.mean([1.0, 0.0], groups=["a", "a"])
    assert (coin.value, coin.n, coin.n_effective) == (0.5, 2, 2.0)
    alone = stats.mean([1.0])
    assert (alone.low, alone.high) == pytest.approx((0.025, 1.0))  # one answer of a coin
    for none in (
        stats.mean([0.4]),
        stats.mean([1.0, 0.0], groups=["a", "a"]),
        stats.mean([1.0, 0.3], groups=["a", "a"]),
    ):
        assert math.isnan(none.low) and math.isnan(none.high) and "fewer than two units" in none.method
    found = stats.difference([0.1, 0.2, 0.4], [0.3])
    assert math.isnan(found.estimate.low) and math.isnan(found.p) and found.at is None
    assert found.estimate.value == pytest.approx(0.3 - 0.7 / 3) and found.estimate.n == 4
    assert math.isfinite(stats.mean([0.4, 0.5]).low)


def test_each_seed_of_several_rows_counts_once() -> None:
    x, units = [0.1, 0.3, 0.5, 0.6, 0.8, 0.2], ["a", "a", "b", "c", "c", "d"]
    means = [0.2, 0.5, 0.7, 0.2]
    expected = scipy_stats.ttest_1samp(means, 0).confidence_interval()
    e = stats.mean_over_units(x, units)
    assert (e.value, e.low, e.high, e.n, e.n_effective) == pytest.approx((np.mean(means), *expected, 4, 4))
    assert e.method == "Student's t over 4 units"
    within = stats.mean_over_units(x, units, bounds=(0, 1))
    assert within == stats.mean_over_units(means, [1, 2, 3, 4], bounds=(0, 1))
    assert within.low > 0 and within.n == within.n_effective == 4 and within.method.startswith("over 4 units, ")
    one = stats.mean_over_units([0.2, 0.4], ["a", "a"])
    assert one.value == pytest.approx(0.3) and math.isnan(one.low) and math.isnan(one.high)
    assert (one.n, one.n_effective, one.method) == (1, 1.0, "one unit, no interval")


def test_a_rate_is_one_where_all_values_of_both_sides_are() -> None:
    coin, other = np.array([0.0, 1.0, 1.0, 0.0]), np.array([0.5, 1.0, 0.0, 1.0])
    for first, second in ((coin, other), (other, coin)):
        for found in (stats.paired_difference(first, second), stats.difference(first, second)):
            assert found.estimate.method == "Student's t"


def test_the_seed_is_that_of_the_draws() -> None:
    for call in (
        lambda seed: stats.mean(SKEWED, seed=seed),
        lambda seed: stats.paired_difference(np.zeros(24), SKEWED, seed=seed).estimate,
        lambda seed: stats.difference(OTHER, SKEWED, seed=seed).estimate,
    ):
        assert call(3) == call(3) and call(3).seed == 3
        assert (call(3).low, call(3).high) != (call(4).low, call(4).high)


# ---- edges ---------------------------------------------------------------------------------------------------------


def test_two_units_have_an_interval_and_one_has_the_mean_alone() -> None:
    two = mean([0.2, 0.4, 0.6, 0.8], groups=["a", "a", "b", "b"], bounds=(0.0, 1.0))
    assert two.value == pytest.approx(0.5) and two.low < 0.5 < two.high
    one = mean([0.2, 0.4], groups=["a", "a"], bounds=(0.0, 1.0))
    assert np.isnan(one.low) and one.value == pytest.approx(0.3)
    pair = mean_over_units([0.1, 0.3, 0.9], [1, 1, 2])
    assert (pair.value, pair.n_effective) == (pytest.approx(0.55), 2.0) and pair.low < 0.55 < pair.high


def test_bounds_without_room_are_refused() -> None:
    with pytest.raises(UsageError):
        mean([0.5, 0.5, 0.5], bounds=(0.5, 0.5))


@pytest.mark.parametrize("graded_first", [False, True])
def test_rates_are_compared_as_rates_only_where_both_are(graded_first: bool) -> None:
    rates, graded = np.array([0.0, 1.0] * 10), np.linspace(0.1, 0.9, 20)
    first, second = (graded, rates) if graded_first else (rates, graded)
    assert "Student" in paired_difference(first, second).estimate.method
    assert "Student" in difference(first, second).estimate.method
    assert "Student" not in difference(rates, rates[::-1]).estimate.method


def test_the_seed_is_0_where_none_is_given_and_is_on_record() -> None:
    x, y = np.random.default_rng(1).normal(size=(2, 40))
    assert paired_difference(x, y).estimate == paired_difference(x, y, seed=0).estimate
    assert difference(x, y).estimate == difference(x, y, seed=0).estimate
    assert paired_difference(x, y, seed=1).estimate.low != paired_difference(x, y).estimate.low
    assert paired_difference(np.zeros(9), np.full(9, 0.5), seed=7).estimate.seed == 7


def test_what_does_not_vary_is_told_from_what_hardly_does_by_the_larger_sample() -> None:
    """Rounding of a sample of millions is no variance, even beside one of thousandths."""
    large, small = 1e6 + 1e-8 * np.arange(12), np.full(12, 1e-3)
    assert "does not vary" in difference(large, small).estimate.method
    assert "does not vary" in difference(small, large).estimate.method


def test_a_class_of_two_units_is_enough_and_of_one_is_not() -> None:
    found = difference([1.0, 2.0, 4.0], [0.0, 1.0])
    assert found.estimate.low < found.estimate.value < found.estimate.high
    assert np.isnan(difference([1.0, 2.0, 4.0], [0.5]).estimate.low)
