"""Shares of controls, and what several tests cost."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from tl_em import stats


def test_a_control_that_does_as_much_counts_on_either_side_unless_one_is_asked() -> None:
    controls = [-3.0, -1.0, 0.5, 2.0, 3.0, 0.0, 0.1]
    assert stats.control_p(3.0, controls) == pytest.approx(3 / 8)
    assert stats.control_p(-3.0, controls) == pytest.approx(3 / 8)
    assert stats.control_p(3.0, controls, two_sided=False) == pytest.approx(2 / 8)
    assert stats.control_p(-2.0, controls, two_sided=False) == pytest.approx(7 / 8)


@pytest.mark.parametrize(("adjust", "method"), [(stats.holm, "holm"), (stats.benjamini_hochberg, "fdr_bh")])
def test_adjustments_are_statsmodels_over_what_is_known(adjust, method: str) -> None:
    p = np.random.default_rng(0).random(12) ** 3
    assert adjust(p) == pytest.approx(multipletests(p, method=method)[1])
    gaps = np.insert(p, [0, 5], np.nan)
    found = adjust(gaps)
    assert np.isnan(found[[0, 6]]).all()
    assert found[np.isfinite(gaps)] == pytest.approx(multipletests(p, method=method)[1])
    assert adjust(np.float64(0.03)).tolist() == [0.03]
    assert np.isnan(adjust([np.nan, np.nan])).all() and adjust([]).shape == (0,)
