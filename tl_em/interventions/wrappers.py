"""An intervention on some prompts only, those whose own activation says so.

    apply to prompt i   iff   c'x_i > above,   x_i the activation at the condition's site at the last token of prompt i

as in conditional activation steering (Lee et al. 2024, arXiv:2409.05907, which compares a cosine; here it is the
component along the unit vector, in the units of the activations). The condition is read once a prompt, in the pass that
reads the prompt's last token, and holds for its answer, with the key-value cache and without.

The control: the same intervention behind a random direction whose threshold lets through as many prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_em.arguments import checked, finite, settle
from tl_em.directions.direction import Direction, as_direction, check_fits
from tl_em.errors import UsageError
from tl_em.interventions.base import Intervention, as_intervention
from tl_em.interventions.edits import component
from tl_em.models.hooks import LensModel, ReadPoint
from tl_em.models.prompts import Batch
from tl_em.models.residual_writes import probing
from tl_em.models.token_scopes import running_batch
from tl_em.models.torch_state import unlowered


@dataclass(frozen=True, eq=False)
class Conditional(Intervention):
    """Apply an intervention only to prompts whose component along a condition direction exceeds a threshold.

    Use it in ``intervene`` and run the model with this package's verbs, which know where each prompt ends. The
    condition is read before the edit: at the same site or an earlier one. Conditions nest: all must hold.

    Args:
        intervention: what to apply.
        direction: the condition direction, read at its own site at the last token of the prompt.
        above: the threshold of the component along its unit vector, in the units of the activations; e.g. the middle
            between the two classes' mean projections.

    Example:
        >>> from tl_em.interventions.edits import Add
        >>> from tl_em.models.sites import Site
        >>> d = Direction(torch.tensor([0.0, 2.0]), Site(1))
        >>> Conditional(Add(d), d, above=1.0).holds(torch.tensor([[5.0, 0.5], [0.0, 1.5]])).tolist()
        [False, True]

    Raises:
        UsageError: no intervention, no direction, or a threshold that is no finite number.

    Source: Lee et al. 2024, arXiv:2409.05907, section 3.
    """

    intervention: Intervention | Any
    direction: Direction | Any
    above: float | int | Any = field(kw_only=True)

    def __post_init__(self) -> None:
        settle(self, intervention=as_intervention, direction=as_direction, above=finite)

    @checked()
    def holds(self, x: Float[Tensor, "prompt d_model"]) -> Bool[Tensor, " prompt"]:
        """Which of these activations meet the condition."""
        return component(x, self.direction.unit) > self.above

    @property
    def inner(self) -> Intervention:
        """What is applied."""
        return self.intervention

    def around_another(self, inner: Intervention) -> Conditional:
        """The same condition for another intervention."""
        return replace(self, intervention=inner)

    @property
    def conditions(self) -> tuple[Conditional, ...]:
        """This one, and those of what is applied."""
        return (self, *self.inner.conditions)

    @checked()
    def check(self, model: LensModel) -> None:
        """Raise ``WidthError`` or ``ProvenanceError`` unless direction and intervention belong on this model."""
        check_fits(self.direction, model)
        super().check(model)


class Gate:
    """Reads a condition in the pass that reads the prompts' last tokens; remembers it for the passes that follow."""

    def __init__(self, conditional: Conditional, point: ReadPoint) -> None:
        self.conditional = conditional
        self.point = point
        self._batch: Batch | None = None
        self._rows: Tensor | None = None

    def measure(self, x: Tensor, hook: Any) -> None:
        """Hook at the condition's site."""
        if probing.get():
            return
        batch = running_batch("a condition")
        if batch.start == 0:
            with unlowered(x.device):
                at_last = self.point(x[torch.arange(len(x)), batch.prompts[: len(x)] - 1])
                self._batch, self._rows = batch, self.conditional.holds(at_last).cpu()

    def rows(self, name: str) -> Bool[Tensor, " prompt"]:
        """Which prompts met the condition.

        Raises:
            UsageError: it has not been read yet: the edit stands before it.
        """
        batch = running_batch("a condition")
        if self._rows is None or (batch.start == 0 and batch is not self._batch):
            raise UsageError(
                f"the edit at {name} happens before its condition is read at {self.conditional.direction.site}, so it "
                "cannot depend on it. Read the condition at an earlier site, or edit later: em.Ablate(direction, "
                "around=centre) and em.Add act at their direction's own site, em.Ablate(direction) from the "
                "embedding on"
            )
        return self._rows
