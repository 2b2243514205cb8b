"""What the next benign fine-tune would show: Student's interval between fine-tunes, added to that over prompts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm, t

from tl_em.stats import Estimate, Prediction, Resampled, bootstrap
from tl_em.stats.prediction import beyond_next

Z = norm.ppf(0.975)
OWN, BENIGN = (1.0, 1.3, 0.9), (0.1, -0.1, 0.3, 0.2)


def over_prompts(value: float, below: float, above: float) -> Resampled:
    return Resampled(Estimate(value, value - below, value + above, 64, 50.0, "bootstrap", seed=7), 0.01)


def reach(half: float, own: tuple[float, ...], benign: tuple[float, ...], tail: float, factor: float = 1.0) -> float:
    """The formula of the module, with quantiles of scipy."""
    a, m = len(own), len(benign)
    between = factor * np.std(benign, ddof=1) * t.ppf(1 - tail, m - 1)
    among = np.std(own, ddof=1) * t.ppf(1 - tail, a - 1) if a > 1 else 0.0
    return math.sqrt((half * norm.ppf(1 - tail) / Z) ** 2 + between**2 * (1 + 1 / m) + among**2 / a)


@pytest.mark.parametrize("own", [OWN[:1], OWN[:2], OWN])
@pytest.mark.parametrize("benign", [BENIGN[:2], BENIGN])
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_the_interval_is_students_between_fine_tunes_and_that_of_prompts(
    own: tuple[float, ...], benign: tuple[float, ...], value: float
) -> None:
    found = Prediction(over_prompts(value, 0.2, 0.4), own, benign).estimate
    assert found.value == value and found.n == found.n_effective == len(benign) and found.seed == 7
    assert found.low == pytest.approx(value - reach(0.2, own, benign, 0.025))
    assert found.high == pytest.approx(value + reach(0.4, own, benign, 0.025))
    assert found.method.endswith(f"from {len(own)} tuned and {len(benign)} benign; prompts: bootstrap")


def test_without_an_interval_over_prompts_only_students_is_left() -> None:
    """Hahn & Meeker: mean +- t s sqrt(1 + 1/m), of what the next one shows."""
    found = Prediction(over_prompts(0.0, 0.0, 0.0), (0.0,), (1.0, 2.0, 3.0)).estimate
    assert (found.low, found.high) == pytest.approx((-4.302653 * math.sqrt(4 / 3), 4.302653 * math.sqrt(4 / 3)))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("own", [OWN[:1], OWN])
def test_p_is_the_level_at_which_the_interval_ends_there(sign: int, own: tuple[float, ...]) -> None:
    near, far = 0.2, 0.4
    halves = (near, far) if sign > 0 else (far, near)
    found = Prediction(over_prompts(sign * 2.0, *halves), own, BENIGN)
    end = found.estimate.low if sign > 0 else -found.estimate.high
    assert found.within(end) == pytest.approx(0.05) and found.within(end - 0.01) < 0.05 < found.within(end + 0.01)
    for tail in (0.2, 0.01, 0.0005):
        left = 2.0 - reach(near, own, BENIGN, tail)
        assert found.within(left) == pytest.approx(2 * tail)
    assert found.within(2.0) == found.within(2.5) == 1.0


def test_as_far_makes_the_benign_spread_larger_by_as_much_as_tuned_went_farther() -> None:
    found = Prediction(over_prompts(2.0, 0.2, 0.4), OWN, BENIGN, farther=3.0)
    left = 2.0 - reach(0.2, OWN, BENIGN, 0.04, factor=3.0)
    assert found.within(left, as_far=True) == pytest.approx(0.08)
    assert found.within(left) == replace(found, farther=1.0).within(left, as_far=True) < 0.03
    assert found.estimate == replace(found, farther=1.0).estimate


@pytest.mark.parametrize("value", [0.5, -0.5, 5.0])
def test_what_no_tail_reaches_has_the_smallest_p(value: float) -> None:
    certain = Prediction(over_prompts(value, 1e-3, 1e-3), (1.0,), (0.0, 0.0))
    assert certain.within(0.1) == pytest.approx(2e-12)
    assert certain.within(abs(value)) == 1.0


def enough(m: int) -> float:
    """What m benign fine-tunes with a spread of 1 reach."""
    return float(t.ppf(0.975, m - 1)) * math.sqrt(1 + 1 / m)


@pytest.mark.parametrize("sign", [1, -1])
def test_needed_is_the_least_number_whose_interval_lies_beyond(sign: int) -> None:
    def needed(value: float) -> int | None:
        return Prediction(over_prompts(sign * value, 0.0, 0.0), (0.0,), (0.0, math.sqrt(2))).needed(0.5)

    for m in (2, 3, 7, 50):
        assert needed(0.5 + enough(m) + 1e-6) == m
    assert needed(0.5 + enough(50) - 1e-6) is None and needed(0.3) is None
    assert needed(0.5 + enough(7) - 1e-6) == 8


def test_needed_looks_at_the_end_nearer_to_0() -> None:
    for value, below, above in ((1.0, 0.5, 9.0), (-1.0, 9.0, 0.5)):
        found = Prediction(over_prompts(value, below, above), (1.0,), (0.0, 0.0))
        assert found.needed(0.4) == 2 and found.needed(0.5) is None  # at 0.5 the interval ends


X = np.linspace(-1, 1, 12)
NOISE = np.sin(np.arange(72.0)).reshape(6, 12)


def mean_of(values: np.ndarray):
    return lambda w, *_: (w * values).sum(-1) / w.sum(-1)


TUNED = [mean_of(X + 2 + each) for each in NOISE[:3]]
PLAIN = [mean_of(X + each) for each in NOISE[3:]]


def values(statistics: list) -> tuple[float, ...]:
    return tuple(float(f(np.ones((1, 12)))[0]) for f in statistics)


@pytest.mark.parametrize("tuned", [1, 3])
@pytest.mark.parametrize("sample", [12, list("aabbccddeeff")])
def test_beside_one_benign_fine_tune_it_is_the_plain_difference_of_the_first(tuned: int, sample: int | list) -> None:
    found = beyond_next(TUNED[:tuned], PLAIN[:1], [sample], seed=3, resamples=99)
    plain = bootstrap(lambda w: TUNED[0](w) - PLAIN[0](w), [sample], seed=3, resamples=99)
    assert isinstance(found, Resampled) and (found.estimate, found.p) == (plain.estimate, plain.p)


@pytest.mark.parametrize(("tuned", "counted"), [(1, 1), (2, 1), (3, 3)])
@pytest.mark.parametrize("sample", [12, list("aabbccddeeff")])
def test_beside_several_it_is_means_with_each_ones_own_value(tuned: int, counted: int, sample: int | list) -> None:
    found = beyond_next(TUNED[:tuned], PLAIN, [sample], seed=3, resamples=99, farther=1.5)

    def difference(w: np.ndarray) -> np.ndarray:
        return np.mean([f(w) for f in TUNED[:counted]], axis=0) - np.mean([f(w) for f in PLAIN], axis=0)

    assert isinstance(found, Prediction) and found.farther == 1.5
    expected = bootstrap(difference, [sample], seed=3, resamples=99).estimate
    assert found.difference.estimate.method == expected.method and found.difference.estimate.seed == 3
    assert [getattr(found.difference.estimate, each) for each in ("value", "low", "high", "n_effective")] == (
        pytest.approx([getattr(expected, each) for each in ("value", "low", "high", "n_effective")])
    )
    assert found.own == pytest.approx(values(TUNED[:counted])) and found.benign == pytest.approx(values(PLAIN))


def test_all_is_divided_by_what_per_gives() -> None:
    samples = [12, ["q"] * 2 + ["r"] * 3]

    def per(w: np.ndarray, v: np.ndarray) -> np.ndarray:
        return 4.0 + 0 * v.sum(-1)

    plain, divided = (beyond_next(TUNED, PLAIN, samples, per=each, resamples=99) for each in (None, per))
    assert isinstance(plain, Prediction) and isinstance(divided, Prediction) and plain.farther == 1.0
    assert divided.own == pytest.approx([each / 4 for each in plain.own])
    assert divided.benign == pytest.approx([each / 4 for each in plain.benign])
    for name in ("value", "low", "high"):
        assert getattr(divided.estimate, name) == pytest.approx(getattr(plain.estimate, name) / 4)


def test_draws_are_those_of_their_seed() -> None:
    first = beyond_next(TUNED, PLAIN, [12], resamples=99)
    same, other = (beyond_next(TUNED, PLAIN, [12], seed=each, resamples=99) for each in (0, 1))
    assert first.estimate == same.estimate and first.estimate.low != other.estimate.low
    assert beyond_next(TUNED, PLAIN, [12]).estimate.method.endswith("2000 draws, percentile")
