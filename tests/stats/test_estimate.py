"""An estimate lies beyond a threshold with its whole interval, survives JSON, and changes its units with both ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tl_em.errors import UsageError
from tl_em.stats import Estimate, Resampled, middle_95

E = Estimate(0.4, 0.3, 0.6, n=20, n_effective=15.0, method="made up", seed=3)


@pytest.mark.parametrize(("threshold", "beyond"), [(0.29, True), (0.3, False), (0.31, False), (-1.0, True)])
def test_beyond_is_of_the_whole_interval_on_either_side(threshold: float, beyond: bool) -> None:
    assert E.beyond(threshold) is beyond
    assert E.scaled(-1).beyond(threshold) is beyond
    assert not Estimate(0.4, -0.1, 0.9, 20, 20.0, "made up").beyond(0.0)
    with pytest.raises(UsageError, match="finite"):
        E.beyond(math.nan)


def test_other_units_scale_value_and_ends_and_keep_the_rest() -> None:
    turned = E.scaled(-2)
    assert (turned.value, turned.low, turned.high) == (-0.8, -1.2, -0.6)
    assert (turned.n, turned.n_effective, turned.method, turned.seed) == (20, 15.0, "made up", 3)
    with pytest.raises(UsageError, match="finite"):
        E.scaled(math.inf)


def test_json_holds_everything_and_no_nan() -> None:
    assert Estimate.from_json(E.to_json()) == E
    none = Estimate(0.4, math.nan, math.inf, 1, 1.0, "one unit")
    plain = none.to_json()
    assert plain == {"value": 0.4, "low": None, "high": None, "n": 1, "n_effective": 1.0, "method": "one unit",
                     "seed": None}  # fmt: skip
    back = Estimate.from_json(plain)
    assert math.isnan(back.low) and math.isnan(back.high) and back.seed is None and back.value == 0.4


def test_it_reads_as_its_interval_or_as_none() -> None:
    assert f"{E}" == repr(E) == "0.40 [0.30, 0.60] n=20"
    assert "0.40" in E._repr_html_()
    assert repr(Estimate(0.4, math.nan, math.nan, 1, 1.0, "")) == "0.40 [no interval] n=1"


def test_a_band_is_of_the_controls_and_not_of_their_mean() -> None:
    x = np.random.default_rng(0).normal(3, 1, 400)
    band = Estimate.band(x, "random latents", seed=4)
    assert band.value == pytest.approx(x.mean())
    assert [band.low, band.high] == pytest.approx(middle_95(x).tolist())
    assert band.high - band.low > 3.5  # of the mean, it would be .2
    assert (band.n, band.n_effective, band.method, band.seed) == (400, 400.0, "2.5-97.5 % band of random latents", 4)
    assert middle_95(np.stack([x, 2 * x]), axis=1).tolist() == [list(each) for each in zip(
        middle_95(x), middle_95(2 * x), strict=True)]  # fmt: skip


@pytest.mark.parametrize("side", [1, -1])
def test_without_its_law_p_is_that_of_a_normal_whose_interval_this_is(side: int) -> None:
    """Of a skewed interval, the end that lies nearer to 0 counts."""
    found = Resampled(Estimate(0.4, 0.3, 0.9, 20, 20.0, "made up").scaled(side), 0.01)
    error = 0.1 / scipy_stats.norm.ppf(0.975)
    for smallest in (0.0, 0.2, 0.35):
        assert found.within(smallest) == pytest.approx(2 * scipy_stats.norm.sf((0.4 - smallest) / error), rel=1e-5)
    assert found.within(0.3) == pytest.approx(0.05, rel=1e-5)
    assert found.within(0.4) == found.within(0.5) == 1.0
    assert found.reversed.within(0.2) == found.within(0.2) and found.reversed.at is None


def test_without_an_interval_nothing_is_beyond() -> None:
    assert Resampled(Estimate(0.4, math.nan, math.nan, 1, 1.0, ""), math.nan).within(0.1) == 1.0
    sure = Resampled(Estimate(0.4, 0.4, 0.4, 9, 9.0, "does not vary"), 0.0)
    assert sure.within(0.1) == 0.0
    assert Resampled(Estimate(math.nan, math.nan, math.nan, 0, 0.0, ""), math.nan).within(0.1) == 1.0


@pytest.mark.parametrize("side", [1, -1])
def test_its_own_law_is_asked_at_the_edge_on_its_side(side: int) -> None:
    found = Resampled(E.scaled(side), 0.01, lambda value: abs(value - 0.1 * side))
    assert found.within(0.25) == pytest.approx(0.15)
    turned = found.reversed
    assert turned.p == 0.01 and turned.within(0.25) == pytest.approx(0.15)
