"""Directions from contrast sets: ``r = mean(positive) - mean(negative)`` at a site and a token position.

Difference in means is the direction that most shifts a mean, and the one for which ablation and addition have been
shown to work causally (Arditi et al. 2024, arXiv:2406.11717, section 2.3; Belrose 2023).  A direction is a description
of the data until an intervention on held-out prompts says otherwise, and needs the split-half reliability beside it:
two halves of the same prompts must give nearly the same vector (``geometry.split_half_reliability``).
"""

from __future__ import annotations

from collections.abc import Sequence

from tl_em.directions.direction import Direction
from tl_em.models.capture import class_means
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, Provenance, Site


def difference_in_means(model: LensModel, contrast: ContrastSet, *, site: Site, position: Position) -> Direction:
    """Mean activation on the positive prompts minus mean activation on the negative ones.

    Args:
        model: any HookedTransformer or TransformerBridge.
        contrast: the two classes of prompts.
        site: where to read.
        position: at which token of each prompt.

    Returns:
        A Direction, in the units of the activations.

    Raises:
        ZeroDirectionError: the two means are the same.
        NonFiniteError: the activations hold NaN or infinity.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """
    return differences_in_means(model, contrast, sites=[site], positions=[position])[0]


def differences_in_means(
    model: LensModel, contrast: ContrastSet, *, sites: Sequence[Site], positions: Sequence[Position]
) -> list[Direction]:
    """:func:`difference_in_means` at every position and site (positions outermost), in one pass over the prompts."""
    means = class_means(model, contrast, sites=sites, positions=positions)
    origin = Provenance.of(model, data=contrast.hash)
    return [
        Direction(
            means.positive[p, s] - means.negative[p, s], site, position=position, name=contrast.label, provenance=origin
        )
        for p, position in enumerate(positions)
        for s, site in enumerate(sites)
    ]
