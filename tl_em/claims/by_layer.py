"""Each direction at every layer, in each model: what is drawn beside the verdicts, and judged nowhere.

Each class's mean projection, the gap, d', the cosine of the re-extracted direction with the base's, and the level in
own gaps.  Where a random direction has the same number, the band of 95 % of them stands beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tl_em.claims.claim import Case, Reading, Statistic, numbered, weighted
from tl_em.claims.questions.rotation import cosine_of_gaps
from tl_em.stats import Estimate


def layer_rows(case: Case) -> list[dict[str, Any]]:
    """Rows of ``Comparison.by_layer`` for one direction at one site."""
    models, rows = {"base": case.base, "tuned": case.tuned} | numbered(case.benign), []
    head = {"direction": case.name, "layer": case.site.layer, "stream": case.site.stream}
    for name, reading in models.items():
        for quantity, (statistic, null) in _quantities(case, name, reading).items():
            e = case.bootstrap(statistic, resamples=300).estimate
            band = Estimate.band([float("nan")] if null is None or name == "base" else null)
            rows.append(
                head | {"quantity": quantity, "model": name, "value": e.value, "low": e.low, "high": e.high}
                | {"control_low": band.low, "control_high": band.high}
            )  # fmt: skip
    return rows


def _quantities(case: Case, model: str, reading: Reading) -> dict[str, tuple[Statistic, np.ndarray | None]]:
    """What is drawn of one model, and the same along random directions."""
    own, base, random = reading.project(case.unit), case.base.project(case.unit), case.controls()
    up = random @ (reading.positive - case.base.positive).mean(0)
    down = random @ (reading.negative - case.base.negative).mean(0)
    found: dict[str, tuple[Statistic, np.ndarray | None]] = {
        "projection_positive": (lambda v, w: weighted(v, own.positive), base.positive.mean() + up),
        "projection_negative": (lambda v, w: weighted(w, own.negative), base.negative.mean() + down),
        "gap": (own.gap, None),
        "dprime": (own.dprime, None),
    }
    if model != "base":
        found["cosine"] = (cosine_of_gaps(case.base, reading), None)
        found["level"] = (
            lambda v, w: (own.balanced(v, w) - base.balanced(v, w)) / base.gap(v, w),
            (up + down) / 2 / float(case.base.mean_difference @ case.unit),
        )
    return found
