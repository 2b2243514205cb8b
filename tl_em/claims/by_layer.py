"""Each direction at every layer, in each model: what is drawn beside the verdicts, and judged nowhere.

Each class's mean projection, the gap, d', the cosine of the re-extracted direction with the base's, and the level in
own gaps.  Where a random direction has the same number, the band of 95 % of them stands beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tl_em.claims.claim import Case, Reading, Statistic, weighted
from tl_em.claims.questions.rotation import cosine_of_gaps
from tl_em.stats import Estimate


def layer_rows(case: Case) -> list[dict[str, Any]]:
    """Rows of ``Comparison.by_layer`` for one direction at one site."""
    models = {"base": case.base, "tuned": case.tuned} | ({} if case.benign is None else {"benign": case.benign})
    return [row for name, reading in models.items() for row in _model_rows(case, name, reading)]


def _model_rows(case: Case, name: str, reading: Reading) -> list[dict[str, Any]]:
    own, base, random = reading.project(case.unit), case.base.project(case.unit), case.controls()
    up = random @ (reading.positive - case.base.positive).mean(0)
    down = random @ (reading.negative - case.base.negative).mean(0)
    quantities: dict[str, tuple[Statistic, np.ndarray | None]] = {
        "projection_positive": (lambda v, w: weighted(v, own.positive), base.positive.mean() + up),
        "projection_negative": (lambda v, w: weighted(w, own.negative), base.negative.mean() + down),
        "gap": (own.gap, None),
        "dprime": (own.dprime, None),
    }
    if name != "base":
        quantities["cosine"] = (cosine_of_gaps(case.base, reading), None)
        quantities["level"] = (
            lambda v, w: (own.balanced(v, w) - base.balanced(v, w)) / base.gap(v, w),
            (up + down) / 2 / float(case.base.mean_difference @ case.unit),
        )
    return [_layer_row(case, quantity, name, *found) for quantity, found in quantities.items()]


def _layer_row(case: Case, quantity: str, model: str, statistic: Statistic, null: np.ndarray | None) -> dict[str, Any]:
    found, nan = case.bootstrap(statistic, resamples=300).estimate.row(), float("nan")
    band = None if null is None or model == "base" else Estimate.band(null)
    return {
        "direction": case.name, "layer": case.site.layer, "stream": case.site.stream, "quantity": quantity,
        "model": model, **{key: found[key] for key in ("value", "low", "high")},
        "control_low": band.low if band else nan, "control_high": band.high if band else nan,
    }  # fmt: skip
