"""Interventions as frozen values: what is changed, where, and a pure function that changes it.

All of them move an activation along one unit vector to a target component ``t``:

    x  ->  x + r (t - r'x)          Ablate: t = 0, or r'c around a centre c;  Clamp: t = min(max(r'x, low), high)
    x  ->  x + a v                  Add: v the raw vector, a the steering coefficient

Zero-ablation is applied at every write to the residual stream (Arditi et al. 2024, arXiv:2406.11717, section 2.4;
2L + 1 hook points, which equals editing every block's input and output).  A centre belongs to a site, so ablation
around one acts at the direction's own site unless a centre is given for each site (ACE, arXiv:2411.09003).

**Control.**  Is an ablation to zero a hidden steer?  ``hidden_steer`` looks, and warns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import checked, finite, optional, settle, vectors
from tl_em.directions.direction import Direction
from tl_em.directions.files import load_directed
from tl_em.directions.profile import Profile, as_directed, direction_at
from tl_em.errors import UsageError, WidthError
from tl_em.interventions.base import EVERY_WRITE, Activation, EveryWrite, Intervention, RowEdit
from tl_em.interventions.hidden_steer import warn_of_hidden_steer
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Site, as_site


def component(x: Activation, unit: Float[Tensor, " d_model"]) -> Float[Tensor, "*axes"]:
    """``r'x``, in float32 or better whatever the dtype of ``x``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) @ unit.to(x.device, wide)


def set_component(x: Activation, unit: Float[Tensor, " d_model"], target: Tensor | float) -> Activation:
    """``x + r (t - r'x)``: the component along ``unit`` becomes ``target``, everything orthogonal to it stays.

    Example:
        >>> set_component(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]), 0.0).tolist()
        [0.0, 4.0]
    """
    change = target - component(x, unit)
    return (x + change[..., None] * unit.to(change.device, change.dtype)).to(x.dtype)  # rounded once


def without_rows(x: Float[Tensor, "row pos d_model"], units: Float[Tensor, "row d_model"]) -> Tensor:
    """``x - r r'x`` with a unit vector for each row, in float32 or better.

    Example:
        >>> without_rows(torch.ones(2, 1, 2), torch.eye(2)).tolist()
        [[[0.0, 1.0]], [[1.0, 0.0]]]
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    units = units.to(x.device, wide)
    along = torch.bmm(x.to(wide), units[:, :, None])
    if x.dtype == wide:
        return torch.baddbmm(x, along, units[:, None], alpha=-1)
    return (x - along * units[:, None]).to(x.dtype)


def around_rows(
    x: Float[Tensor, "row pos d_model"], units: Float[Tensor, "row d_model"], centre: Float[Tensor, " d_model"] | Any
) -> Tensor:
    """``x + r r'(c - x)`` with a unit vector for each row, in float32 or better."""
    units = units.to(x.device, torch.promote_types(x.dtype, torch.float32))[:, None]
    along = [(each.to(units) * units).sum(-1) for each in (centre[None, None], x)]
    return (x + (along[0] - along[1])[..., None] * units).to(x.dtype)


class Removal(Intervention):
    """What removals share: to zero at every write, or around a centre at the site that the centre belongs to."""

    direction: Direction | Profile | Any
    around: Float[Tensor, " d_model"] | Mapping[Site, Float[Tensor, " d_model"]] | Any

    @property
    def _home(self) -> Site:
        """Where a single centre belongs."""
        if isinstance(self.direction, Profile):
            raise UsageError(
                f"one centre for {self.direction!r}: a centre belongs to a site, and a profile has several; map each "
                "of its sites to one: around={site: em.mean_activation(model, prompts, site=site, position=…), …}"
            )
        return self.direction.site

    def _settle_centres(self, width: int) -> None:
        if self.around is None:
            return
        if isinstance(self.around, Mapping):
            centres = {as_site("a key of around", s): vectors(f"around[{s}]", c) for s, c in self.around.items()}
            if not centres:
                raise UsageError("around={} gives no centre, so nothing would be edited; leave it out, or name a site")
            object.__setattr__(self, "around", centres)
        else:
            object.__setattr__(self, "around", vectors("around", self.around))
        for site, centre in self._centres().items():
            if len(centre) != width:
                raise WidthError(
                    f"the centre is {len(centre)} wide and what is removed {width}; pass "
                    f"em.mean_activation(model, prompts, site={site!r}, position=…)"
                )

    def _centres(self) -> dict[Site, Tensor]:
        if self.around is None:
            return {}
        return dict(self.around) if isinstance(self.around, Mapping) else {self._home: self.around}

    def _centre(self, name: str | None) -> Tensor | None:
        """The centre at a hook point, float32 on the CPU."""
        centres = {site.hook_name: centre for site, centre in self._centres().items()}
        if not centres:
            return None
        return centres.get(name or "", next(iter(centres.values())))

    @property
    def sites(self) -> tuple[Site, ...] | EveryWrite:
        """Every write, or the sites of the centres."""
        return EVERY_WRITE if self.around is None else tuple(self._centres())

    @property
    def linear(self) -> bool:
        """To zero it is a projection; around a centre it is affine."""
        return self.around is None


@dataclass(frozen=True, eq=False)
class Ablate(Removal):
    """Directional ablation: remove the component along a direction, to zero or to a centre.

    Args:
        direction: what to remove. Of a Profile each layer's own, at that layer's site and not at every write.
        around: ``None``: to zero, at every write to the residual stream.  A vector [d_model] (a mean activation): to
            the centre's own component, at the direction's site, so that the mean is kept.  A mapping from Site to such
            vectors: at each of those sites.

    Raises:
        WidthError: a centre has another width than the direction.
        NonFiniteError: a centre holds NaN or infinity.

    Example:
        >>> d = Direction(torch.tensor([0.0, 2.0]), Site(1))
        >>> Ablate(d).edit(torch.tensor([[3.0, 4.0]])).tolist()
        [[3.0, 0.0]]
        >>> Ablate(d, around=torch.tensor([9.0, 1.0])).edit(torch.tensor([[3.0, 4.0]])).tolist()
        [[3.0, 1.0]]
        >>> Ablate(d).hook_names(n_layers=1)
        ('blocks.0.hook_resid_pre', 'blocks.0.hook_attn_out', 'blocks.0.hook_mlp_out')

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.4; centred form: Marshall et al. 2024, arXiv:2411.09003.
    """

    direction: Direction | Profile | Any
    around: Float[Tensor, " d_model"] | Mapping[Site, Float[Tensor, " d_model"]] | Any = None

    def __post_init__(self) -> None:
        settle(self, direction=as_directed)
        own = self._directions
        self._settle_centres(len(own[0].vector))
        if isinstance(self.direction, Profile) and self.around is not None and {*self.around} - {*self.direction.sites}:
            wrong = ", ".join(map(str, {*self.around} - {*self.direction.sites}))
            raise UsageError(
                f"around= has a centre at {wrong}, where {self.direction!r} has no direction; give centres at its sites"
            )

    @property
    def _directions(self) -> tuple[Direction, ...]:
        return self.direction.directions if isinstance(self.direction, Profile) else (self.direction,)

    @property
    def sites(self) -> tuple[Site, ...] | EveryWrite:
        """Every write, the sites of the centres, or those of a profile."""
        return self.direction.sites if isinstance(self.direction, Profile) and self.around is None else super().sites

    @property
    def linear(self) -> bool:
        """To zero it is a projection; around a centre it is affine, and of a profile another one at each site."""
        return self.around is None and isinstance(self.direction, Direction)

    @checked()
    def check(self, model: LensModel) -> None:
        """Raise as every intervention does; warn when an ablation to zero is known to be a hidden steer."""
        super().check(model)
        for each in self._directions if self.around is None else ():
            warn_of_hidden_steer(each)

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        """Set the component along the direction to the centre's (0 without one)."""
        unit, centre = direction_at(self.direction, name).unit, self._centre(name)
        target = 0.0 if centre is None else float(centre @ unit)
        return set_component(x, unit, target)

    def rowwise(self, vectors: Float[Tensor, "direction d_model"]) -> RowEdit:
        """The components along many directions at once."""
        if self.around is None:
            wide = vectors.cpu().double()  # as Direction.unit has it
            exact = (wide / wide.norm(dim=-1, keepdim=True)).float().to(vectors.device)
            return lambda x, rows, name=None: without_rows(x, exact[rows])
        units = vectors / vectors.norm(dim=-1, keepdim=True)
        return lambda x, rows, name=None: around_rows(x, units[rows], self._centre(name))


@dataclass(frozen=True, eq=False)
class Add(Intervention):
    """Activation addition: add ``coefficient`` times the raw vector at the direction's site.

    Args:
        direction: what to add; its raw length counts, so that 1 is one difference in means. Of a Profile each layer's
            own, at that layer's site.
        coefficient: steering coefficient, in lengths of the raw vector.

    Raises:
        UsageError: a coefficient that is no finite number.

    Example:
        >>> Add(Direction(torch.tensor([0.0, 2.0]), Site(1)), 2.0).edit(torch.tensor([[3.0, 4.0]])).tolist()
        [[3.0, 8.0]]

    Source: Turner et al. 2023, arXiv:2308.10248; Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """

    direction: Direction | Profile | Any
    coefficient: float | int | Any = 1.0

    def __post_init__(self) -> None:
        settle(self, direction=as_directed, coefficient=finite)

    @property
    def strongest(self) -> float:
        """There is no end: the coefficient may be any number, of either sign."""
        return math.inf

    @checked(strength=finite)
    def at(self, strength: float) -> Add:
        """``strength`` times the coefficient."""
        return replace(self, coefficient=strength * self.coefficient)

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        """``x + coefficient * vector``."""
        return (x + self.coefficient * direction_at(self.direction, name).vector.to(x.device)).to(x.dtype)

    def rowwise(self, vectors: Float[Tensor, "direction d_model"]) -> RowEdit:
        """Many vectors at once, with the one coefficient."""
        scaled = self.coefficient * vectors
        return lambda x, rows, name=None: (x + scaled[rows][:, None].to(x.device)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Clamp(Intervention):
    """Keep the component along a direction between two bounds, at the direction's site.

    Args:
        direction: along which. Of a Profile each layer's own, at that layer's site.
        low: lower bound of the component along the unit vector, in the units of the activations; ``None``: none.
        high: upper bound; ``high`` alone is activation capping.

    Raises:
        UsageError: no bound is given, or the lower is above the upper.

    Example:
        >>> Clamp(Direction(torch.tensor([0.0, 2.0]), Site(1)), high=1.0).edit(torch.tensor([[3.0, 4.0]])).tolist()
        [[3.0, 1.0]]

    Source: capping ``h - v max(0, v'h - t)``: arXiv:2601.10387.
    """

    direction: Direction | Profile | Any
    low: float | int | Any = None
    high: float | int | Any = None

    def __post_init__(self) -> None:
        settle(self, direction=as_directed, low=optional(finite), high=optional(finite))
        if self.low is None and self.high is None:
            raise UsageError("Clamp without a bound changes nothing; pass low=, high= or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise UsageError(f"low={self.low} is above high={self.high}, so no value satisfies both; swap them")

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        """Move components that lie outside the bounds onto the nearer bound."""
        unit = direction_at(self.direction, name).unit
        return set_component(x, unit, component(x, unit).clamp(min=self.low, max=self.high))


def of_directions(given: Any, coefficient: float | int | None = None) -> tuple[Intervention | Any, ...]:
    """Interventions from directions or their files, as a command line gives them; what is an intervention stays one.

    Args:
        given: a file (commas part several), a direction or profile, an intervention, or a list of these.
        coefficient: how much of each direction is added; None ablates it.

    Raises:
        UsageError: a coefficient of nothing.

    Example:
        >>> from tl_em.models.sites import Site
        >>> direction = Direction(torch.ones(4), Site(1))
        >>> [type(each).__name__ for given in (None, 2.0) for each in of_directions(direction, given)]
        ['Ablate', 'Add']
    """
    items = given.split(",") if isinstance(given, str) else given if isinstance(given, list | tuple) else [given]
    if coefficient is not None and not items:
        raise UsageError("a coefficient came without a direction, so nothing is added; give a file of one too")
    made = [load_directed(str(each)) if isinstance(each, str | os.PathLike) else each for each in items]
    treat = Ablate if coefficient is None else lambda each: Add(each, float(coefficient))
    return tuple(treat(each) if isinstance(each, Direction | Profile) else each for each in made)
