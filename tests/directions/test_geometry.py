"""Control directions follow the within-class covariance; halves keep groups whole."""

from __future__ import annotations

import numpy as np
import pytest

from tl_em.directions import geometry
from tl_em.errors import UsageError
from tl_em.stats import half_splits


def classes(n: int, gap: float, seed: int = 0, d: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scale = np.linspace(0.1, 2, d)
    shift = np.zeros(d)
    shift[0] = gap
    return rng.normal(size=(n, d)) * scale + shift, rng.normal(size=(n, d)) * scale


def test_control_directions_have_the_within_class_covariance_and_the_length() -> None:
    positive, negative = classes(400, gap=50.0)
    draws = geometry.control_directions(positive, negative, count=4000, norm=3.0, seed=0)
    assert np.linalg.norm(draws, axis=1) == pytest.approx(3.0)
    spread = (draws**2).mean(0)
    expected = np.concatenate([positive - positive.mean(0), negative - negative.mean(0)]).var(0)
    assert np.corrcoef(spread, expected)[0, 1] > 0.99
    # The gap between the classes is not within them: the controls do not point along it, isotropic draws from all
    # would.
    assert spread[0] / spread.sum() < 0.02


def test_no_within_class_variance_is_refused() -> None:
    with pytest.raises(UsageError, match="do not vary"):
        geometry.control_directions(np.ones((3, 4)), np.zeros((3, 4)), count=5, norm=1.0, seed=0)


def test_half_splits_never_part_a_group() -> None:
    groups = ["a", "b", "a", "c", "d", "b"]
    for mask in half_splits(groups, splits=20, seed=1):
        halves = {g: {m for m, h in zip(mask, groups, strict=True) if h == g} for g in groups}
        assert all(len(sides) == 1 for sides in halves.values())
        assert 0 < mask.sum() < len(groups)


def test_dprime_is_the_gap_in_standard_deviations() -> None:
    rng = np.random.default_rng(0)
    assert geometry.separation(rng.normal(3, 2, 4000), rng.normal(0, 2, 4000)) == pytest.approx(1.5, abs=0.1)
