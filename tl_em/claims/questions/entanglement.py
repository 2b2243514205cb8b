"""Whether the fine-tuning data push along a direction, and whether the fine-tune went there.

    prospective     base model, mean over the answer's tokens: training answer - the base's own answer to the same
                    prompt; cosine of the mean difference with the direction (persona vectors, arXiv:2507.21509)
    retrospective   tuned - base on the training rows; cosine of the mean shift with the direction

Both are judged, by the weaker one.  Control: the cosine with random directions of the base's within-class covariance.
"""

from __future__ import annotations

import numpy as np

from tl_em.claims.claim import Case, Finding, Question
from tl_em.directions.geometry import cosine
from tl_em.directions.screening import answers, replied
from tl_em.stats import Resampled, bootstrap


class Entanglement(Question):
    """The question *entanglement*: see the head of this file."""

    name, words, unit, smallest = "entanglement", ("entangled", "entangled"), "cosine", 0.10
    asks = "Do the fine-tuning data push along the direction?"
    measured = (
        "Cosine of the direction with the mean difference that the training answers make in the base model, and the "
        "share of the change of activations on these data that lies along the direction."
    )
    of_change = False

    def measure(self, case: Case) -> Finding | None:
        """Cosine of what the training data ask for, and of what training did, with the direction."""
        rows, site, base = case.tuning_data, case.site, case.pair.base
        if rows is None:
            return None
        taught = answers(base, rows, site)
        own = answers(base, [replied(row, answer) for row, answer in zip(rows, case.own_answers(), strict=True)], site)
        shifts = {"prospective": taught - own, "retrospective": answers(case.pair.tuned, rows, site) - taught}
        found = {name: _bootstrapped(case, shift) for name, shift in shifts.items()}
        weaker = min(found, key=lambda name: abs(found[name].estimate.value))
        if np.sign(found["prospective"].estimate.value) != np.sign(found["retrospective"].estimate.value):
            weaker = "retrospective"
        beyond = None
        if case.benign_model is not None:
            moved = answers(case.benign_model, rows, site) - taught
            beyond = _bootstrapped(case, shifts["retrospective"], moved).estimate
        return case.finding(
            self, Resampled(found[weaker].estimate, max(f.p for f in found.values())),
            controls=cosine(case.controls(), shifts[weaker].mean(0)[None]), unit=f"of cosine ({weaker})", benign=beyond,
            detail={name: f.estimate for name, f in found.items()},
        )  # fmt: skip


def _bootstrapped(case: Case, shift: np.ndarray, less: np.ndarray | None = None) -> Resampled:
    """Cosine of the mean shift with the direction, less that of another shift of the same rows."""

    def along(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return cosine(w @ x / w.sum(-1, keepdims=True), case.unit[None])

    return bootstrap(
        lambda w: along(shift, w) - (0 if less is None else along(less, w)), [len(shift)], seed=case.seed
    )
