"""A plain function with a name and a unit is a metric; what is none is refused where it is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tl_em as em
from tl_em.directions.direction import Projection
from tl_em.errors import NonFiniteError, UsageError
from tl_em.metrics import measured
from tl_em.models.hooks import LensModel

PROMPTS = ["the cat sat", "please steal", "the dog ran"]


def made(value: Any, name: Any = "mine", unit: Any = "nats") -> Any:
    def metric(model: Any, prompts: Any) -> Any:
        return value

    metric.__dict__.update({word: said for word, said in (("name", name), ("unit", unit)) if said is not None})
    return metric


@pytest.mark.surface
def test_a_plain_function_is_a_metric_from_end_to_end(small_model: LensModel) -> None:
    direction = em.Direction(torch.ones(32), em.Site(1))

    def mine(model: LensModel, prompts: Any) -> Any:
        return em.capture(model, prompts, [em.Site(1)], position="prompt_end").sum((1, 2))

    mine.__dict__.update(name="sum of the stream", unit="activation")
    expected = Projection(direction)(small_model, PROMPTS).double().numpy() * np.sqrt(32)
    np.testing.assert_allclose(measured(mine, small_model, PROMPTS), expected, rtol=1e-4, atol=1e-4)
    curve = em.effect_curve(small_model, em.Add(direction), PROMPTS, metric=mine, strengths=[1], controls=0)
    change = curve.points[1].change.value
    assert change == pytest.approx(32, rel=1e-3)  # a unit in each of 32 dimensions


@pytest.mark.parametrize(
    ("metric", "error", "said"),
    [
        (made([1.0, 2.0]), UsageError, r"'mine' returned shape \(2,\) in place of \(3,\)"),
        (made([1.0, float("nan"), 2.0]), NonFiniteError, "'mine' returned NaN for prompt 1"),
        (made("three"), UsageError, "'mine' returned a str"),
        (made([1.0] * 3, name=None), UsageError, "has no name"),
        (made([1.0] * 3, unit=None), UsageError, "has no unit"),
        (3, UsageError, "cannot be called"),
    ],
)
def test_what_is_no_metric_is_refused(metric: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        measured(metric, None, PROMPTS)
    if "returned" not in said:
        with pytest.raises(UsageError, match=said):
            em.Behaviour("kind", metric, PROMPTS, PROMPTS[:1])
