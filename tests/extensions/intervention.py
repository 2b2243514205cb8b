"""An intervention of one's own: activations are mirrored in the plane that is orthogonal to a direction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import tl_em as em


@dataclass(frozen=True, eq=False)
class Mirror(em.Intervention):
    """``x - 2 r r'x`` at a site; its direction is what a random one stands in for in an effect curve."""

    direction: em.Direction
    site: em.Site

    def edit(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        unit = self.direction.unit.to(x)
        return x - 2 * (x @ unit)[..., None] * unit
