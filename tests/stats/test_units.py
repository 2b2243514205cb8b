"""What belongs together is drawn together, and is worth what its variance between and within says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tl_em.errors import UsageError
from tl_em.stats.units import as_counts, design_effect, half_splits, n_effective, tied, units_of


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
