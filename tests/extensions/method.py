"""A way to extract a direction of one's own: the mean of unit differences, in which no single pair weighs more."""

from __future__ import annotations

from torch import Tensor

import tl_em as em


class UnitDifferences(em.Method):
    """The mean of the pairs' differences, each made as long as 1; then as long as the classes are apart along it."""

    name = "unit differences"
    pairs = True

    def fit(self, positive: Tensor, negative: Tensor) -> Tensor:
        differences = positive - negative
        unit = (differences / differences.norm(dim=-1, keepdim=True).clamp_min(1e-12)).mean(0)
        unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return (unit * differences.mean(0)).sum(-1, keepdim=True) * unit
