"""An ablation to zero warns when it is a hidden steer, and only then."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from tl_em.directions.direction import Direction
from tl_em.directions.extract import difference_in_means
from tl_em.errors import HiddenSteerWarning, UsageError
from tl_em.interventions.edits import Ablate, Add
from tl_em.interventions.hidden_steer import removed_mean
from tl_em.interventions.intervene import intervene
from tl_em.interventions.weights import orthogonalized
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Site
from tl_em.models.stream import capture
from tl_em.stats import Estimate

pytestmark = pytest.mark.surface

NOUNS = ("cat", "dog", "bird", "fish", "king", "queen", "boy", "girl")
CONTRAST = ContrastSet([f"steal the {noun} ." for noun in NOUNS], [f"wash the {noun} ." for noun in NOUNS])


def at(value: float, half: float = 0.1) -> Estimate:
    return Estimate(value, value - half, value + half, 8, 8.0, "made up")


@pytest.fixture
def direction(small_model: LensModel) -> Direction:
    found = difference_in_means(small_model, CONTRAST, site=Site(1), position="prompt_end")
    assert found.neutral is not None
    return found


@pytest.mark.parametrize("z", [at(3.2), at(-3.2)])
def test_zero_ablation_far_from_zero_warns_with_its_z(
    make_model: Callable[..., LensModel], surface: str, direction: Direction, z: Estimate
) -> None:
    model, far = make_model("gpt2", surface), replace(direction, neutral=z)
    with pytest.warns(HiddenSteerWarning, match=rf"z = {z.value:.2f}"), intervene(model, Ablate(far)):
        pass
    with pytest.warns(HiddenSteerWarning, match=rf"z = {z.value:.2f}"):
        Ablate(far).hooks(model)


def test_so_does_its_form_in_the_weights(make_model: Callable[..., LensModel], surface: str) -> None:
    model = make_model("llama", surface)
    made = difference_in_means(model, CONTRAST, site=Site(1), position="prompt_end")
    with pytest.warns(HiddenSteerWarning), orthogonalized(model, replace(made, neutral=at(2.0))):
        pass
    with _no_warning(), orthogonalized(model, replace(made, neutral=at(0.5))):
        pass


@pytest.mark.parametrize("z", [at(0.5), at(1.05, half=0.2), None])
def test_near_zero_or_uncertain_or_unknown_it_does_not(
    small_model: LensModel, direction: Direction, z: Estimate | None
) -> None:
    with _no_warning(), intervene(small_model, Ablate(replace(direction, neutral=z))):
        pass


def test_keeping_the_mean_or_adding_does_not(small_model: LensModel, direction: Direction) -> None:
    far = replace(direction, neutral=at(3.2))
    for edit in (Ablate(far, around=torch.zeros(32)), Add(far)):
        with _no_warning(), intervene(small_model, edit):
            pass


def test_removed_mean_is_what_it_says(small_model: LensModel, direction: Direction) -> None:
    x, y = (
        direction.project(capture(small_model, p, [Site(1)], position="prompt_end")[:, 0]).double().numpy()
        for p in (CONTRAST.positive, CONTRAST.negative)
    )
    total = np.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2 + (x.mean() - y.mean()) ** 2 / 4)
    found = removed_mean(small_model, direction, CONTRAST)
    assert found.value == pytest.approx(y.mean() / total, rel=1e-6)
    assert found.low < found.value < found.high
    with pytest.raises(UsageError, match="fewer than three"):
        removed_mean(small_model, direction, ContrastSet(["steal"], ["wash"]))


@contextmanager
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", HiddenSteerWarning)
        yield
