"""Intervals cover what they should, clustering costs what it should, and absent effects are not found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tl_em import stats
from tl_em.errors import UsageError


def test_intervals_cover_the_truth_at_their_level() -> None:
    rng = np.random.default_rng(0)
    hits = [e.low <= 0.3 <= e.high for e in (stats.mean(rng.normal(0.3, 1, 20), seed=i) for i in range(300))]
    assert 0.91 <= np.mean(hits) <= 0.985  # 300 draws at .95: +- 3 binomial standard errors


def test_clustered_intervals_cover_and_unclustered_ones_do_not() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(12), 20)
    clustered, naive = [], []
    for i in range(150):
        x = rng.normal(size=12)[groups] + rng.normal(size=240)
        for found, labels in ((clustered, groups.tolist()), (naive, None)):
            e = stats.mean(x, groups=labels, seed=i)
            found.append(e.low <= 0 <= e.high)
    assert np.mean(clustered) >= 0.89
    assert np.mean(naive) <= 0.60  # the control: ignoring the questions is far too sure of itself


def test_effective_n_is_what_the_design_effect_says() -> None:
    """8 questions x 50 answers at intraclass correlations .2, .5, .9 are worth 37, 16 and 9 independent answers."""
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(2000), 50)
    for icc, worth in ((0.2, 37), (0.5, 16), (0.9, 9)):
        x = math.sqrt(icc) * rng.normal(size=2000)[groups] + math.sqrt(1 - icc) * rng.normal(size=len(groups))
        assert 400 / stats.design_effect(x, groups.tolist()) == pytest.approx(worth, abs=1)
    e = stats.mean(x[:400], groups=groups[:400].tolist())
    assert e.n == 400
    assert e.n_effective < 20
    assert stats.mean(x[:400]).n_effective == 400


@pytest.mark.parametrize("values", [[0.5], [0.2, 0.4, 0.6]])
def test_fewer_than_two_units_give_no_interval_and_say_so(values: list[float]) -> None:
    e = stats.mean(values, groups=["one question"] * len(values))
    assert math.isnan(e.low)
    assert math.isnan(e.high)
    assert e.value == pytest.approx(np.mean(values))
    assert "fewer than two" in e.method
    assert "no interval" in str(e)
    assert not e.beyond(-1)
    assert e.to_json()["low"] is None


def test_paired_difference_uses_the_pairing() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(0, 10, 60)
    tuned = base + 0.5 + rng.normal(0, 0.1, 60)
    paired, unpaired = stats.paired_difference(base, tuned), stats.difference(base, tuned)
    assert paired.estimate.low > 0.4
    assert paired.p < 0.01
    assert unpaired.estimate.low < 0 < unpaired.estimate.high


def test_samples_that_share_questions_are_drawn_together() -> None:
    """With the same question effects in both classes, the difference is sure; drawn apart it would not be."""
    rng = np.random.default_rng(4)
    effect, labels = rng.normal(0, 10, 30), [str(i) for i in range(30)]
    x, y = effect, effect + 1
    joint = stats.difference(x, y, groups=(labels, labels)).estimate
    apart = stats.difference(x, y, groups=(labels, [f"other {label}" for label in labels])).estimate
    assert joint.low == pytest.approx(1)
    assert joint.high == pytest.approx(1)
    assert apart.high - apart.low > 5


def test_resampling_is_reproducible_and_depends_on_its_seed() -> None:
    x = np.random.default_rng(5).normal(size=30)
    assert stats.mean(x, seed=1) == stats.mean(x, seed=1)
    assert stats.mean(x, seed=1) != stats.mean(x, seed=2)


def test_bootstrap_p_is_calibrated() -> None:
    rng = np.random.default_rng(7)
    p = [stats.paired_difference(np.zeros(40), rng.normal(size=40), seed=i).p for i in range(300)]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.10


def test_holm_is_the_textbook_step_down_and_keeps_nan() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.benjamini_hochberg([0.01, 0.02, 0.9]) == pytest.approx([0.03, 0.03, 0.9])
    adjusted = stats.holm([0.01, float("nan")])
    assert adjusted[0] == pytest.approx(0.01)
    assert math.isnan(adjusted[1])


def test_control_p_never_is_zero_and_knows_its_sides() -> None:
    assert stats.control_p(5.0, np.zeros(99)) == pytest.approx(0.01)
    assert stats.control_p(-5.0, np.zeros(99), two_sided=False) == 1.0


@pytest.mark.parametrize("values", [[1.0, float("nan")], [[1.0, 2.0]]])
def test_metrics_that_are_not_one_finite_number_a_prompt_are_refused(values: list) -> None:
    with pytest.raises(UsageError, match="one finite number for each prompt"):
        stats.mean(values)


def test_empty_and_unequal_samples_are_refused() -> None:
    with pytest.raises(UsageError, match="no prompts"):
        stats.mean([])
    with pytest.raises(UsageError, match="cannot be paired"):
        stats.paired_difference([1.0], [1.0, 2.0])


def test_a_rate_of_none_has_the_exact_upper_end() -> None:
    """0 of 60: 1 - .025^(1/60); a bootstrap would have no width here."""
    e = stats.mean(np.zeros(60))
    assert e.low == 0
    assert e.high == pytest.approx(1 - 0.025 ** (1 / 60))
    assert stats.mean(np.ones(60)).low == pytest.approx(0.025 ** (1 / 60))


def test_questions_that_all_answer_alike_count_once_each() -> None:
    e = stats.mean(np.zeros(60), groups=np.repeat(np.arange(10), 6).tolist())
    assert e.high == pytest.approx(1 - 0.025 ** (1 / 10))


@pytest.mark.parametrize("values", [[0.01] * 5 + [0.02] * 5, [0.0] * 9 + [1e-9], [0.999, 0.9999, 1.0] * 4])
def test_a_probability_stays_in_its_range_and_keeps_a_width(values: list[float]) -> None:
    e = stats.mean(values, bounds=(0, 1))
    assert 0 <= e.low <= e.value <= e.high <= 1
    assert e.high > e.low


def test_bounds_that_the_values_leave_are_refused() -> None:
    with pytest.raises(UsageError, match="do not lie in bounds"):
        stats.mean([0.5, 1.5, 0.7], bounds=(0, 1))


def test_a_paired_rate_has_a_width_where_nothing_changed() -> None:
    same = np.array([0.0, 1.0] * 8)
    found = stats.paired_difference(same, same)
    assert found.estimate.value == 0
    assert found.estimate.low < -0.1
    assert found.estimate.high > 0.1
    assert found.p == pytest.approx(1)
    up = stats.paired_difference(np.zeros(32), np.ones(32))
    assert up.estimate.low > 0.8
    assert up.p < 1e-6


def test_the_mean_of_a_few_is_students() -> None:
    from scipy import stats as scipy_stats

    x = [0.3, 1.2, 0.7, 0.1]
    e, expected = stats.mean(x), scipy_stats.ttest_1samp(x, 0.0)
    assert (e.low, e.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert stats.paired_difference(np.zeros(4), x).p == pytest.approx(expected.pvalue)


def test_p_is_the_level_at_which_the_interval_ends() -> None:
    """Beyond a threshold just where p of "no farther than that" is below .05, whatever makes the interval."""
    rng = np.random.default_rng(8)
    for n in (5, 20, 60):
        x = rng.normal(0.5, 1, n)
        coin = (rng.random(n) < 0.7).astype(float)
        found = [
            stats.paired_difference(np.zeros(n), x),
            stats.paired_difference(np.zeros(n), coin),
            stats.difference(rng.normal(size=n), x),
            stats.bootstrap(lambda w, x=x: w @ x**2 / w.sum(-1), [n]),
        ]
        for each in found:
            e = each.estimate
            edges = [e.low, (e.low + e.value) / 2, e.low - 0.02] if e.value > 0 else [-e.high, 0.0]
            for edge in (edge for edge in edges if edge >= 0 and abs(e.low - edge) > 1e-3):
                p = each.within(edge)
                assert e.beyond(edge) == (p < 0.05) or abs(p - 0.05) < 0.003  # a draw more or less


def test_two_classes_that_do_not_overlap_have_a_lower_end() -> None:
    e = stats.auroc(np.arange(16.0) + 100, np.arange(16.0))
    assert e.value == 1
    assert 0.7 < e.low < 0.95
    assert e.high == 1
    turned = stats.auroc(np.arange(16.0), np.arange(16.0) + 100)
    assert turned.high == pytest.approx(1 - e.low)


def test_rates_over_seeds_stay_in_their_range() -> None:
    e = stats.mean_over_units([0.97, 0.99, 1.0], [1, 2, 3], bounds=(0, 1))
    assert e.high <= 1
    assert e.low < 0.97
    assert stats.mean_over_units([0.97, 0.99, 1.0], [1, 2, 3]).high > 1  # the control: t alone leaves it


def test_the_opposite_effect_has_the_same_p_on_the_other_side() -> None:
    found = stats.paired_difference(np.zeros(20), np.random.default_rng(9).normal(1, 1, 20))
    turned = found.reversed
    assert (turned.estimate.low, turned.estimate.high) == (-found.estimate.high, -found.estimate.low)
    assert turned.p == found.p
    assert turned.within(0.3) == found.within(0.3) < 1
    assert turned.estimate.value < 0 < found.estimate.value


def predicted(own: list[float], benign: list[float], prompts: float = 0.01) -> stats.Prediction:
    """Means of fine-tunes, each known to this standard error."""
    value = float(np.mean(own) - np.mean(benign))
    e = stats.Estimate(value, value - 1.96 * prompts, value + 1.96 * prompts, 64, 64.0, "test")
    return stats.Prediction(stats.Resampled(e, 0.0), tuple(own), tuple(benign))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_one_more_benign_fine_tune_is_told_apart_in_one_of_twenty(count: int) -> None:
    rng, outside, naive = np.random.default_rng(count), [], []
    for _ in range(400):
        first, *benign = rng.normal(0, 0.2, 1 + count).tolist()
        found = predicted([first], benign)
        outside.append(found.estimate.beyond(0))
        naive.append(found.difference.estimate.beyond(0))
    assert np.mean(outside) <= 0.083  # .05 + 3 binomial standard errors
    assert np.mean(outside) >= 0.015  # and it does not hold by never telling anything apart
    assert np.mean(naive) > 0.8  # the control: prompts say nothing of how fine-tunes differ


def test_the_spread_of_tuned_ones_widens_and_none_at_all_leaves_the_prompts() -> None:
    alike, apart = predicted([0.5, 0.51, 0.49], [0.0, 0.02, -0.02]), predicted([0.2, 0.5, 0.8], [0.0, 0.02, -0.02])
    assert alike.estimate.beyond(0.1)
    assert not apart.estimate.beyond(0.1)
    still = predicted([0.5], [0.1, 0.1, 0.1])
    assert (still.estimate.low, still.estimate.high) == pytest.approx((0.3804, 0.4196), abs=1e-6)


def test_the_p_is_that_of_the_interval_and_the_number_needed_is_the_first_that_passes() -> None:
    found = predicted([0.9], [0.2, -0.1, 0.1])
    low = found.estimate.low
    assert found.within(low - 1e-6) < 0.05 < found.within(low + 1e-6)
    assert found.within(0.95) == 1.0
    mirrored = predicted([-0.9], [-0.2, 0.1, -0.1])
    assert mirrored.within(0.1) == pytest.approx(found.within(0.1), rel=1e-6)
    needed = found.needed(0.1)
    assert needed is not None and needed > 3
    assert predicted([0.06], [0.01, -0.01]).needed(0.1) is None
    spread = float(np.std([0.2, -0.1, 0.1], ddof=1))

    def of(count: int) -> bool:
        """Whether so many benign fine-tunes of this mean and spread pass."""
        x = np.linspace(-1, 1, count)
        return predicted([0.9], (x * spread / np.std(x, ddof=1) + 1 / 15).tolist()).estimate.low > 0.1

    assert of(needed) and not of(needed - 1)


def test_benign_fine_tunes_that_moved_less_are_taken_as_strong_as_tuned_where_they_stand_for_controls() -> None:
    found = predicted([0.9], [0.1, -0.1, 0.0])
    far = stats.Prediction(found.difference, found.own, found.benign, farther=3.0)
    assert far.within(0) == found.within(0) == found.within(0, as_far=True) < far.within(0, as_far=True)


def test_beyond_next_is_the_difference_with_one_and_counts_tuned_ones_from_three_on() -> None:
    rng = np.random.default_rng(0)
    x = [rng.normal(size=40) + shift for shift in (0.5, 0.6, 0.7, 0.0, 0.1)]
    mean = [lambda w, each=each: w @ each / w.sum(-1) for each in x]
    one = stats.beyond_next(mean[:3], mean[3:4], [40])
    assert isinstance(one, stats.Resampled)
    assert one.estimate == stats.bootstrap(lambda w: mean[0](w) - mean[3](w), [40]).estimate
    for own, mean_of_own in ((2, x[0].mean()), (3, np.mean([each.mean() for each in x[:3]]))):
        several = stats.beyond_next(mean[:own], mean[3:], [40], per=lambda w: np.full(len(w), 2.0))
        assert isinstance(several, stats.Prediction)
        expected = (mean_of_own - (x[3].mean() + x[4].mean()) / 2) / 2
        assert several.estimate.value == pytest.approx(expected)
        assert several.benign == pytest.approx((x[3].mean() / 2, x[4].mean() / 2))
