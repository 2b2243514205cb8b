"""A stranger's way to extract a direction, by value and as a plain function; a malformed one is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tl_em as em
from tests.extensions.method import UnitDifferences
from tl_em.directions.extract import Extraction
from tl_em.directions.methods.difference_in_means import DifferenceInMeans
from tl_em.errors import NonFiniteError, UsageError, WidthError, ZeroDirectionError
from tl_em.models.hooks import LensModel

NOUNS = ("cat", "dog", "bird", "fish", "king", "queen", "boy", "girl", "car", "bank", "story")
CONTRAST = em.ContrastSet(
    [f"please steal the {noun}" for noun in NOUNS], [f"please wash the {noun}" for noun in NOUNS], label="steal"
)
SITES = [em.Site(0), em.Site(2)]


def median(positive: Tensor, negative: Tensor) -> Tensor:
    return positive.median(0).values - negative.median(0).values


@pytest.mark.surface
def test_it_finds_directions_with_their_reliability(small_model: LensModel) -> None:
    found = em.extract_directions(small_model, CONTRAST, sites=SITES, method=UnitDifferences())
    usual = em.extract_directions(small_model, CONTRAST, sites=SITES)
    for own, other in zip(found, usual, strict=True):
        assert own.method == "unit differences" and own.site == other.site
        assert own.reliability is not None and own.reliability.value > 0.5 and own.neutral is not None
        assert 0.9 < float(own.unit @ other.unit) < 1 - 1e-9
        assert own.norm == pytest.approx(other.norm, rel=0.2)


@pytest.mark.surface
def test_a_plain_function_is_a_method_and_candidates_take_one(small_model: LensModel) -> None:
    found = em.candidate_directions(small_model, CONTRAST, positions=["prompt_end"], layers=[1, 2], method=median)
    assert [(each.site.layer, each.method) for each in found] == [(1, "median"), (2, "median")]
    acts = [em.capture(small_model, p, [found[0].site], position="prompt_end").double()
            for p in (CONTRAST.positive, CONTRAST.negative)]  # fmt: skip
    torch.testing.assert_close(found[0].vector, median(*acts)[0].float())


@pytest.mark.surface
def test_means_from_sums_equal_the_same_method_fitted(small_model: LensModel) -> None:
    class Kept(DifferenceInMeans):
        means_over = None

    streamed, fitted = (
        [direction for direction, *_ in Extraction(small_model, CONTRAST, SITES, ["prompt_end"], method).made()]
        for method in (DifferenceInMeans(), Kept())
    )
    for one, other in zip(streamed, fitted, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one.vector, other.vector, rtol=1e-4, atol=1e-5)


@pytest.mark.surface
@pytest.mark.parametrize(
    ("fit", "error", "said"),
    [
        (lambda x, y: x.mean(0), ZeroDirectionError, None),
        (lambda x, y: (x.mean(0) - y.mean(0))[0], WidthError, r"returned shape \(32,\) in place of \(2, 32\)"),
        (lambda x, y: float("nan") * x[0], NonFiniteError, r"returned NaN or infinity at resid_post\[0\]"),
        (lambda x, y: "north", UsageError, "returned a str"),
        (lambda x, y: 0 * x[0], ZeroDirectionError, r"finds no direction at resid_post\[0\]"),
    ],
)
def test_what_is_no_direction_is_refused(small_model: LensModel, fit: Any, error: Any, said: str | None) -> None:
    fit.__name__ = "mine"
    if said is None:  # a fit of one class only is a direction, if a poor one
        assert len(em.extract_directions(small_model, CONTRAST, sites=SITES, method=fit)) == 2
        return
    with pytest.raises(error, match=f"method 'mine' {said}"):
        em.extract_directions(small_model, CONTRAST, sites=SITES, method=fit)


def test_what_is_no_method_is_refused() -> None:
    class Nameless(em.Method):
        def fit(self, positive: Tensor, negative: Tensor) -> Tensor:
            return positive[0]

    for bad in (Nameless(), UnitDifferences, 3, object()):
        with pytest.raises(UsageError, match="no way to extract a direction"):
            em.extract_directions(None, CONTRAST, method=bad)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_an_audit_with_it() -> None:
    pair = em.load_pair("toy/insecure")
    asked = {"persona": pair.contrasts["persona"]}
    report = em.audit(pair, contrasts=asked, method=UnitDifferences(), controls=99)
    assert report.verdicts
