"""Whether the fine-tuning data push along a direction, and whether the fine-tune went there.

    prospective     base model, mean over the answer's tokens: training answer - the base's own answer to the same
                    prompt; cosine of the mean difference with the direction (persona vectors, arXiv:2507.21509)
    retrospective   tuned - base on the training rows; cosine of the mean shift with the direction

Both are judged, by the weaker one.  Control: the cosine with random directions of the base's within-class covariance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tl_em.claims.questions.changes import RANDOM, Measured
from tl_em.claims.rule import SMALLEST_EFFECT, Finding
from tl_em.directions.geometry import cosine
from tl_em.directions.screening import Row, answers, replied
from tl_em.models.hooks import LensModel
from tl_em.stats import Resampled, bootstrap


def entanglement(
    measured: Measured,
    base: LensModel,
    tuned: LensModel,
    benign: LensModel | None,
    rows: Sequence[Row],
    own_answers: Sequence[str],
    *,
    controls: int,
) -> Finding:
    """Cosine of what the training data ask for, and of what training did, with the direction."""
    site = measured.direction.site
    taught = answers(base, rows, site)
    own = answers(base, [replied(row, answer) for row, answer in zip(rows, own_answers, strict=True)], site)
    shifts = {"prospective": taught - own, "retrospective": answers(tuned, rows, site) - taught}
    found = {name: _cosine(shift, measured) for name, shift in shifts.items()}
    weaker = min(found, key=lambda name: abs(found[name].estimate.value))
    if np.sign(found["prospective"].estimate.value) != np.sign(found["retrospective"].estimate.value):
        weaker = "retrospective"
    random = measured.controls(controls)
    beyond = None
    if benign is not None:
        moved = answers(benign, rows, site) - taught
        beyond = bootstrap(
            lambda w: _weighted_cosine(shifts["retrospective"], w, measured) - _weighted_cosine(moved, w, measured),
            [len(rows)],
            seed=measured.seed,
        ).estimate
    return Finding(
        "entanglement", measured.name, site, found[weaker].estimate, max(f.p for f in found.values()),
        cosine(random, shifts[weaker].mean(0)[None]), RANDOM, SMALLEST_EFFECT["entanglement"], f"of cosine ({weaker})",
        beyond, {name: f.estimate for name, f in found.items()},
    )  # fmt: skip


def _cosine(shift: np.ndarray, measured: Measured) -> Resampled:
    return bootstrap(lambda w: _weighted_cosine(shift, w, measured), [len(shift)], seed=measured.seed)


def _weighted_cosine(shift: np.ndarray, w: np.ndarray, measured: Measured) -> np.ndarray:
    return cosine(w @ shift / w.sum(-1, keepdims=True), measured.unit[None])
