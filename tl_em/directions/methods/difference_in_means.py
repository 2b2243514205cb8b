"""Difference in means: ``mean(positive) - mean(negative)``, every prompt counting once.

The direction that most shifts a mean, and the one for which ablation and addition have been shown to work causally
(Arditi et al. 2024, arXiv:2406.11717, section 2.3; Belrose 2023).  **Control**: see ``directions.methods.base``.
"""

from __future__ import annotations

from torch import Tensor

from tl_em.directions.methods.base import Method


class DifferenceInMeans(Method):
    """Mean activation on the positive prompts minus mean activation on the negative ones.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """

    name = "difference_in_means"
    means_over = "prompts"

    def fit(self, positive: Tensor, negative: Tensor) -> Tensor:
        return positive.mean(0) - negative.mean(0)
