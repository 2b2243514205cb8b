"""Paired: mean over pairs (or groups) of (mean positive in it - mean negative in it).

Every pair or group counts once, whatever its number of prompts, and one without both classes not at all: so questions
that were asked more often weigh no more.  **Control**: see ``directions.methods.base``.
"""

from __future__ import annotations

from torch import Tensor

from tl_em.directions.methods.base import Method


class Paired(Method):
    """The mean over pairs, or groups, of the difference of both classes' means in each.

    Source: Panickssery et al. 2023, arXiv:2312.06681 (contrastive pairs).
    """

    name = "paired"
    pairs = True
    means_over = "groups"

    def fit(self, positive: Tensor, negative: Tensor) -> Tensor:
        return (positive - negative).mean(0)
