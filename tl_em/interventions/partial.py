"""A part of an intervention: ``x -> x + s (edit(x) - x)``, for 0 <= s <= 1.

Half an ablation to zero halves the component at every write, and therefore in the whole residual stream.  With it,
edits that have no coefficient of their own can be given the same push as others (``calibrate``), which is what makes
the effect of a direction comparable with that of a random one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tl_em.arguments import FRACTION, settle
from tl_em.interventions.edits import Hook, Intervention, masked
from tl_em.models.hooks import LensModel
from tl_em.models.modes import unlowered


@dataclass(frozen=True, eq=False)
class Partial:
    """An intervention carried out in part.

    Args:
        whole: the intervention.
        strength: 0 changes nothing, 1 is the whole.

    Raises:
        UsageError: a strength outside 0 to 1.

    Example:
        >>> import torch
        >>> from tl_em.directions.direction import Direction
        >>> from tl_em.interventions.edits import Ablate
        >>> from tl_em.models.sites import Site
        >>> half = Partial(Ablate(Direction(torch.tensor([0.0, 2.0]), Site(1))), 0.5)
        >>> half.edit(torch.tensor([[3.0, 4.0]])).tolist()
        [[3.0, 2.0]]
    """

    whole: Intervention | Any
    strength: float | int | Any

    def __post_init__(self) -> None:
        settle(self, strength=FRACTION)

    def check(self, model: LensModel) -> None:
        """As the whole checks."""
        self.whole.check(model)

    def hook_names(self, n_layers: int) -> tuple[str, ...]:
        """Those of the whole."""
        return self.whole.hook_names(n_layers)

    def points(self, model: LensModel) -> tuple[str, ...]:
        """Those of the whole."""
        return self.whole.points(model)

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        """``x + strength * (whole.edit(x) - x)``."""
        return masked(x + self.strength * (self.whole.edit(x, name=name) - x), x, mask)

    def hooks(self, model: LensModel, where: str = "all") -> list[Hook]:
        """Plain hooks, as the whole gives them, with this edit."""
        return [(name, self._hook(name)) for name, _ in self.whole.hooks(model, where)]

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def apply(x: Tensor, hook: Any) -> Tensor:
            with unlowered(x.device):
                return self.edit(x, name=name)

        return apply
