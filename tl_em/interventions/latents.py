"""Latents of a dictionary scaled or set, by a delta at the dictionary's own site.

    x  ->  x + (a' - a) W_dec          a = encode(x) of these latents;  a' = factor * a, or a given value

What the dictionary does not explain (its error) stays as it is, other hooks at the point keep working, and the model
holds no dictionary. SAELens's ``use_error_term`` gives the same, by replacing the hook point.

The control: random latents of the same density and decoder norm, treated the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import checked, finite, instance_of, list_of, optional, settle, vectors
from tl_em.dictionaries import Dictionary, Feature
from tl_em.dictionaries.protocol import as_dictionary
from tl_em.errors import UsageError, WidthError
from tl_em.interventions.base import Intervention
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Site

_as_feature = instance_of(Feature, "latent", "there is nothing to scale", "dictionary.feature(index)")


def _as_value(name: str, value: Any) -> float | Tensor:
    """One number for all latents, or a vector of one each."""
    one_each = getattr(value, "ndim", int(isinstance(value, list | tuple)))
    return vectors(name, value) if one_each else finite(name, value)


@dataclass(frozen=True, eq=False)
class ScaleFeature(Intervention):
    """Scale latents of an SAE, or set them to a value.

    Args:
        feature: one latent, or several of one dictionary (of another's: ``em.Feature(dictionary, index)``).
        factor: 0 ablates, 1 changes nothing, 2 doubles.
        to: in place of a factor the activation to set: a number, or one for each latent. A latent that is off is
            switched on by this, and by no factor.

    Raises:
        UsageError: no latent, latents of several dictionaries, both or neither of ``factor`` and ``to``, or a
            transcoder, whose latents are read at one site and written at another.
        WidthError: ``to`` has another length than there are latents.

    Example:
        >>> eye = torch.eye(2)
        >>> sae = Dictionary(eye, torch.zeros(2), eye, torch.zeros(2), activation="relu", site_in=Site(1))
        >>> ScaleFeature(sae.feature(1), 0.0).edit(torch.tensor([[3.0, 4.0], [3.0, -4.0]])).tolist()
        [[3.0, 0.0], [3.0, -4.0]]
        >>> ScaleFeature(sae.feature(0), to=5.0).edit(torch.tensor([[3.0, 4.0]])).tolist()
        [[5.0, 4.0]]

    Source: Templeton et al. 2024, "Scaling Monosemanticity" (error kept); Marks et al. 2024, arXiv:2403.19647.
    """

    feature: Feature | Sequence[Feature] | Any
    factor: float | int | Any = None
    to: Float[Tensor, " latent"] | float | int | Any = None

    def __post_init__(self) -> None:
        given: Any = self.feature
        latents: tuple[Feature, ...] = (
            (given,) if isinstance(given, Feature) else list_of(_as_feature)("feature", given)
        )
        ours = {id(each.dictionary): as_dictionary(each.dictionary) for each in latents}  # each is proven once
        latents = tuple(Feature(ours[id(each.dictionary)], each.index) for each in latents)
        object.__setattr__(self, "feature", latents)
        if len({each.dictionary.hash for each in latents}) != 1:
            raise UsageError(
                "latents of one dictionary are scaled together; give at least one, and one ScaleFeature for each "
                "dictionary, in the order in which they shall act"
            )
        if (self.factor is None) == (self.to is None):
            raise UsageError("pass either factor= (0 ablates) or to= (the activation to set)")
        settle(self, factor=optional(finite), to=optional(_as_value))
        if isinstance(self.to, Tensor) and len(self.to) != len(latents):
            raise WidthError(f"to= has {len(self.to)} values for {len(latents)} latents; give one value each")
        if self.dictionary.is_transcoder:
            raise UsageError(
                f"{self.dictionary.label} reads {self.dictionary.site_in} and writes {self.dictionary.site_out}, so "
                "its latents are not in what is edited; ablate a decoder row: em.Ablate(em.Direction(W_dec[i], site))"
            )

    @property
    def latents(self) -> tuple[Feature, ...]:
        """The latents, as a tuple."""
        assert not isinstance(self.feature, Feature)
        return tuple(self.feature)

    @property
    def dictionary(self) -> Dictionary:
        """The dictionary that they belong to."""
        return self.latents[0].dictionary

    @property
    def site(self) -> Site:
        """The dictionary's."""
        return self.dictionary.site_in

    @checked()
    def check(self, model: LensModel) -> None:
        """Raise ``WidthError`` or ``ProvenanceError`` unless the dictionary belongs on this model."""
        self.dictionary.check(model)

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        """Add the change of these latents, decoded; arithmetic in float32."""
        index = torch.tensor([each.index for each in self.latents], device=x.device)
        a = self.dictionary.encode(x)[..., index]
        if self.factor is None:
            wanted = torch.as_tensor(self.to, dtype=torch.float32, device=x.device).expand_as(a)
        else:
            wanted = a * self.factor
        change = (wanted - a) @ self.dictionary.to(x.device).W_dec[index]
        return (x + change).to(x.dtype)
