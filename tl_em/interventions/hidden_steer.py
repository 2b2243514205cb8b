"""Is an ablation to zero a hidden steer?

    z = mean(r'x over prompts without the concept) / sd(r'x over all prompts)

Setting the component along r to 0 moves every prompt by minus its component. Where prompts *without* the concept have a
mean far from 0, what is called an ablation pushes all of them to where none of them was. A direction that was extracted
here knows its z from its own prompts (``Direction.neutral``); ``removed_mean`` measures it on others. When the whole
interval lies beyond 1 standard deviation, an ablation to zero warns; ``around=em.mean_activation(...)`` keeps the mean.
"""

from __future__ import annotations

import warnings

from tl_em.arguments import checked
from tl_em.directions.direction import Direction, Projection, as_direction
from tl_em.directions.reliability import neutral_z
from tl_em.errors import HiddenSteerWarning, UsageError
from tl_em.models.class_means import as_contrast
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.torch_state import in_plain_torch
from tl_em.stats import Estimate

_FAR = 1.0
"""Standard deviations beyond which a removed mean is worth a warning."""


@checked(contrast=as_contrast, direction=as_direction)
@in_plain_torch
def removed_mean(model: LensModel, direction: Direction, contrast: ContrastSet) -> Estimate:
    """Mean component of prompts without the concept along a direction, in standard deviations of all prompts.

    Args:
        model: any HookedTransformer or TransformerBridge.
        direction: read at its own site and position.
        contrast: prompts with the concept and without it, preferably others than those it was extracted from.

    Returns:
        z with its interval; 0 means that an ablation to zero leaves prompts without the concept where they are on
        average.

    Raises:
        UsageError: fewer than three prompts in a class, or activations that do not vary along the direction.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> parts = pair.contrasts["persona"].split(seed=0)
        >>> persona = em.difference_in_means(pair.base, parts.train, site=em.Site(2), position="prompt_end")
        >>> removed_mean(pair.base, persona, parts.test).beyond(1.0)  # an ablation to zero is no hidden steer here
        False
    """
    projected = Projection(direction)
    positive, negative = (projected(model, each).double().numpy() for each in (contrast.positive, contrast.negative))
    found = neutral_z(positive, negative)
    if found is None:
        raise UsageError(
            f"{contrast!r} gives no standard deviation along {direction.name or 'the direction'} (fewer than three "
            "prompts in a class, or no variation); give more prompts"
        )
    return found


def warn_of_hidden_steer(direction: Direction) -> None:
    """Warn when an ablation to zero along the direction is known to move prompts without the concept."""
    if direction.neutral is not None and direction.neutral.beyond(_FAR):
        warnings.warn(
            f"{direction.name or 'the direction'}: prompts without the concept lie at z = {direction.neutral} standard "
            "deviations along it, so an ablation to zero pushes all of them by that much, which is a steer; keep the "
            "mean with em.Ablate(direction, around=em.mean_activation(model, negative_prompts, site=direction.site, "
            "position=direction.position))",
            HiddenSteerWarning,
            stacklevel=4,
        )
