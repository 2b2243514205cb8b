"""Integrated gradients: plain gradients, averaged over stream values on the way from the reference to the prompt.

    x_i = reference + (clean - reference) (i + 1/2) / n        midpoints

Source: Hanna et al. 2024, arXiv:2403.17806 (on the input embeddings).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tl_em.graph.rules.plain import Plain


@dataclass(frozen=True)
class IntegratedGradients(Plain):
    """Plain gradients at the midpoints of ``count`` equal steps.

    Args:
        count: of steps; 5 as in arXiv:2403.17806.
    """

    count: int = 5

    name = "ig"
    graphs = ("components",)

    def steps(self, start: Tensor, end: Tensor) -> Sequence[Tensor]:
        """The midpoints."""
        return [start + (end - start) * (step + 0.5) / self.count for step in range(self.count)]
