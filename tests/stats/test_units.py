"""What belongs together is drawn together, and is worth what its variance between and within says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tl_em.errors import UsageError
from tl_em.stats.units import (
    as_counts,
    design_effect,
    half_splits,
    intraclass,
    n_effective,
    shuffled_labels,
    tied,
    units_of,
)


def test_samples_without_shared_labels_are_strata_of_their_own() -> None:
    strata, members = units_of([3, ["a", "b", "a"], 2])
    assert strata == [3, 2, 2]
    assert [(s, index.tolist()) for s, index in members] == [(0, [0, 1, 2]), (1, [0, 1, 0]), (2, [0, 1])]


def test_samples_that_share_a_label_are_one_stratum() -> None:
    strata, members = units_of([["a", "b"], ["b", "c", "c"]])
    assert strata == [3]
    assert [(s, index.tolist()) for s, index in members] == [(0, [0, 1]), (0, [1, 2, 2])]


@pytest.mark.parametrize("samples", [[], [0], [3, []]])
def test_a_sample_without_prompts_is_refused(samples: list) -> None:
    with pytest.raises(UsageError, match="no prompts"):
        units_of(samples)


def test_ties_join_through_others() -> None:
    assert tied([["x"], [], ["y"], ["x", "y"], ["z"], []]).tolist() == [0, 1, 0, 0, 2, 3]
    assert tied([]).tolist() == []
    assert tied([[], []]).tolist() == [0, 1]
    assert tied([["x", "y"], ["z"], ["y", "z"], ["w"], ["w"]]).tolist() == [0, 0, 0, 1, 1]


def test_halves_hold_whole_groups_and_half_of_them() -> None:
    groups = ["a", "b", "b", "c", "d", "d", "d", "e"]
    masks = half_splits(groups, splits=40, seed=1)
    assert masks.shape == (40, 8) and set(np.unique(masks)) == {0.0, 1.0}
    assert (masks[:, 1] == masks[:, 2]).all() and (masks[:, 4:7] == masks[:, 4:5]).all()
    assert (masks[:, [0, 1, 3, 4, 7]].sum(1) == 2).all()
    assert 0 < masks[:, 0].mean() < 1
    assert (masks == half_splits(groups, splits=40, seed=1)).all()
    assert (masks != half_splits(groups, splits=40, seed=2)).any()


def test_a_draw_is_how_often_each_unit_was_drawn() -> None:
    drawn = np.array([[0, 0, 2, 3], [3, 1, 3, 3]])
    assert as_counts(drawn, 4).tolist() == [[2, 0, 1, 1], [0, 1, 0, 3]]


def anova(values: np.ndarray, sizes: list[int]) -> float:
    """1 + (m - 1) r with r = (F - 1) / (F - 1 + n0), F from scipy (Donner 1986)."""
    parts = np.split(values, np.cumsum(sizes)[:-1])
    f, n, k = float(scipy_stats.f_oneway(*parts).statistic), sum(sizes), len(sizes)
    n0 = (n - sum(s**2 for s in sizes) / n) / (k - 1)
    return 1 + (n / k - 1) * (f - 1) / (f - 1 + n0)


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [1, 2, 5, 9, 3]])
def test_the_design_effect_is_that_of_a_one_way_analysis_of_variance(sizes: list[int]) -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    x = rng.normal(size=len(sizes))[groups] + 0.8 * rng.normal(size=len(groups)) + 7
    assert 1 < design_effect(x, groups.tolist()) == pytest.approx(anova(x, sizes))


def test_the_design_effect_is_1_where_groups_tell_nothing() -> None:
    apart = np.array([0.0, 1.0, 0.0, 1.0])
    assert design_effect(apart, ["a", "a", "b", "b"]) == 1.0  # less than chance between: not below 1
    assert design_effect(apart, ["a"] * 4) == 1.0
    assert design_effect(apart, ["a", "b", "c", "d"]) == 1.0
    assert design_effect(np.ones(4), ["a", "a", "b", "b"]) == 1.0


def test_prompts_are_worth_what_the_statistic_makes_of_their_groups() -> None:
    """Of a mean and of a ratio: the influence of each prompt is what is clustered."""
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(10), 4).tolist()
    x = rng.normal(size=10)[groups] + 0.5 * rng.normal(size=40)
    worth = n_effective([groups, 7], lambda w, v: w @ x / w.sum(-1) + 0 * v.sum(-1), [40, 7])
    assert worth == pytest.approx(40 / design_effect(x, groups) + 7, rel=1e-3)
    assert worth < 30
    alone = n_effective([list(range(40))], lambda w: w @ x / w.sum(-1), [40])
    assert alone == 40
    both = n_effective([groups, groups], lambda w, v: w @ x / w.sum(-1) - v @ x**2 / v.sum(-1), [40, 40])
    assert both == pytest.approx(40 / design_effect(x, groups) + 40 / design_effect(x**2, groups), rel=1e-2)


def test_any_smooth_function_of_a_mean_is_worth_as_much_as_the_mean() -> None:
    groups = ["a", "a", "b", "b", "c", "c", "d", "d"]
    x = np.array([0.0, 0.9, 1.0, 0.3, 2.0, 1.2, 0.5, 1.1])
    plain = n_effective([groups], lambda w: w @ x / w.sum(-1), [8])
    assert n_effective([groups], lambda w: np.exp(20 * w @ x / w.sum(-1)), [8]) == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [1, 2, 5, 9, 3], [2, 7]])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_the_share_between_groups_and_its_interval_are_searles(sizes: list[int], spread: float) -> None:
    """(F / q - 1) / (F / q - 1 + n0) with F of scipy: q = 1, and the quantiles of F for the interval."""
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    x = spread * rng.normal(size=len(sizes))[groups] + rng.normal(size=len(groups))
    f = float(scipy_stats.f_oneway(*np.split(x, np.cumsum(sizes)[:-1])).statistic)
    n, k = sum(sizes), len(sizes)
    n0 = (n - sum(s**2 for s in sizes) / n) / (k - 1)
    high, low = (f / scipy_stats.f.ppf(q, k - 1, n - k) for q in (0.025, 0.975))
    expected = [min(max((each - 1) / (each - 1 + n0), 0), 1) for each in (f, low, high)]
    found = intraclass(x, groups.tolist())
    assert [found.value, found.low, found.high] == pytest.approx(expected)
    assert (found.n, found.n_effective) == (n, k)


def test_the_share_between_groups_by_hand() -> None:
    """Means 1, 4, 4 of groups of 2, 1, 3: mean squares of 12 / 2 and 4 / 3, and groups of (6 - 14 / 6) / 2."""
    found = intraclass(np.array([0.0, 2.0, 4.0, 3.0, 4.0, 5.0]), ["a", "a", "b", "c", "c", "c"])
    between, within, size = 12 / 2, 4 / 3, 11 / 6
    assert found.value == pytest.approx((between - within) / (between + (size - 1) * within))


def test_the_share_between_groups_needs_repetition_and_variance() -> None:
    x = np.array([0.0, 1.0, 0.0, 1.0])
    for groups, values, said in (
        (["a"] * 4, x, "no repetition"), (list("abcd"), x, "no repetition"), (list("aabb"), np.ones(4), "do not vary"),
    ):  # fmt: skip
        found = intraclass(values, groups)
        assert said in found.method and np.isnan([found.low, found.high]).all()
        assert (found.value, found.n, found.n_effective) == (0.0, 4, len(set(groups)))
    alike = intraclass(x, list("aabb"))  # means that are alike: none lies between, and the interval says how sure
    assert (alike.value, alike.low, alike.high) == (0.0, 0.0, 0.0) and (alike.n, alike.n_effective) == (4, 2)


def test_labels_are_exchanged_between_prompts_in_every_way_alike_often() -> None:
    found = shuffled_labels(5, 2, None, 3000, seed=0)
    assert found.shape == (3000, 5) and found.dtype == bool and (found.sum(1) == 2).all()
    ways, counts = np.unique(found, axis=0, return_counts=True)
    assert len(ways) == 10 and scipy_stats.chisquare(counts).pvalue > 0.001
    assert (found == shuffled_labels(5, 2, None, 3000, seed=0)).all()
    assert (found != shuffled_labels(5, 2, None, 3000, seed=1)).any()
    assert len(shuffled_labels(5, 2, None, 7, seed=0)) == 7


def test_groups_of_one_class_are_relabelled_whole() -> None:
    groups = (["a", "b", "a"], ["c", "d", "d", "e"])
    found = shuffled_labels(7, 3, groups, 3000, seed=0)
    assert (found[:, 0] == found[:, 2]).all() and (found[:, 4] == found[:, 5]).all()
    of_group = found[:, [0, 1, 3, 4, 6]]
    assert (of_group.sum(1) == 2).all()  # as many groups of either class
    ways, counts = np.unique(of_group, axis=0, return_counts=True)
    assert len(ways) == 10 and scipy_stats.chisquare(counts).pvalue > 0.001


def test_groups_that_hold_both_classes_keep_how_many_they_hold() -> None:
    groups = (["b", "a", "b", "c"], ["a", "c", "b", "c", "a"])
    found = shuffled_labels(9, 4, groups, 3000, seed=0)
    of = {"a": [1, 4, 8], "b": [0, 2, 6], "c": [3, 5, 7]}
    for name, first in (("a", 1), ("b", 2), ("c", 1)):
        ways, counts = np.unique(found[:, of[name]], axis=0, return_counts=True)
        assert (ways.sum(1) == first).all() and len(ways) == 3
        assert scipy_stats.chisquare(counts).pvalue > 0.001
    assert (found == shuffled_labels(9, 4, groups, 3000, seed=0)).all()
    assert (found != shuffled_labels(9, 4, groups, 3000, seed=1)).any()


def test_groups_of_one_class_are_exchanged_beside_those_of_both() -> None:
    groups = (["both", "p", "q", "p"], ["r", "both", "s", "t", "both"])
    found = shuffled_labels(9, 4, groups, 3000, seed=0)
    assert (found[:, [0, 5, 8]].sum(1) == 1).all() and (found[:, 1] == found[:, 3]).all()
    whole = found[:, [1, 2, 4, 6, 7]]
    assert (whole.sum(1) == 2).all()
    for part, ways_there_are in ((whole, 10), (found[:, [0, 5, 8]], 3)):
        ways, counts = np.unique(part, axis=0, return_counts=True)
        assert len(ways) == ways_there_are and scipy_stats.chisquare(counts).pvalue > 0.001
