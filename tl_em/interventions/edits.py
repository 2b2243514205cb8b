"""Interventions as frozen values: what is changed, where, and a pure function that changes it.

All of them move an activation along one unit vector to a target component ``t``:

    x  ->  x + r (t - r'x)          Ablate: t = 0, or r'c around a centre c;  Clamp: t = min(max(r'x, low), high)
    x  ->  x + a v                  Add: v the raw vector, a the steering coefficient

Zero-ablation is applied at every write to the residual stream (Arditi et al. 2024, arXiv:2406.11717, section 2.4;
2L + 1 hook points, which equals editing every block's input and output).  A centre belongs to a site, so ablation
around one acts at the direction's own site unless a centre is given for each site (ACE, arXiv:2411.09003).  Setting to
0 a component whose mean is far from 0 is a hidden steer, of which ``interventions.removed_mean`` warns: prefer
``around=em.mean_activation(...)`` when two models are compared.

An effect counts as the direction's own only beside random directions with the same treatment
(``directions.geometry.control_directions``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_em.arguments import finite, optional, settle, vectors
from tl_em.directions.direction import Direction, as_direction, check_fits
from tl_em.errors import UsageError, WidthError
from tl_em.interventions.removed_mean import warn_of_hidden_steer
from tl_em.models.hooks import LensModel, hook_name, write_points
from tl_em.models.modes import unlowered
from tl_em.models.sites import Site, as_site

Activation = Float[Tensor, "*axes d_model"]
Hook = tuple[str, Callable[..., Tensor]]


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
    return x + (change[..., None] * unit.to(change.device, change.dtype)).to(x.dtype)


def masked(edited: Activation, x: Activation, mask: Bool[Tensor, "*axes"] | None) -> Activation:
    """The edit where ``mask`` holds, the original elsewhere; everywhere without a mask."""
    return edited if mask is None else torch.where(mask[..., None].to(x.device), edited, x)


@runtime_checkable
class Intervention(Protocol):
    """What every intervention offers: the names of its hook points, a check that it fits a model, and a pure edit."""

    def check(self, model: LensModel) -> None: ...

    def hook_names(self, n_layers: int) -> tuple[str, ...]: ...

    def points(self, model: LensModel) -> tuple[str, ...]: ...

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor: ...

    def hooks(self, model: LensModel, where: str = "all") -> list[Hook]: ...


def as_intervention(name: str, value: Any) -> Any:
    """``value``, if it is an intervention.

    Raises:
        UsageError: anything else.
    """
    if isinstance(value, type) or not isinstance(value, Intervention):
        raise UsageError(
            f"{name}: {type(value).__name__} is not an intervention; wrap a direction in em.Ablate, em.Add or em.Clamp"
        )
    return value


class AtItsSite:
    """The part that all interventions share: hook points of the direction's own site, and plain hooks."""

    direction: Direction | Any

    @property
    def _home(self) -> Site:
        return self.direction.site

    def check(self, model: LensModel) -> None:
        """Raise ``WidthError`` or ``ProvenanceError`` unless this belongs on the model."""
        check_fits(self.direction, model)

    def hook_names(self, n_layers: int) -> tuple[str, ...]:
        """Names of the hook points that are edited, as they are called on every surface."""
        return (self._home.hook_name,)

    def points(self, model: LensModel) -> tuple[str, ...]:
        """The same names, resolved on this model.

        Raises:
            UnknownHookError: the model has no such site.
            UsageError: the site can be read but not written.
        """
        check_writable(self._home)
        return (hook_name(model, self._home),)

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        """The edit itself; subclasses say what it is."""
        raise NotImplementedError

    def hooks(self, model: LensModel, where: str = "all") -> list[Hook]:
        """Plain ``(hook_name, fn)`` pairs for ``model.run_with_hooks(tokens, fwd_hooks=...)``, at all positions.

        Args:
            model: the model that they will run on; the direction is checked against it.
            where: only ``"all"``: a plain hook does not know which token is prompt and which is answer.

        Raises:
            UsageError: another scope was asked for.
            ProvenanceError, WidthError: the direction does not fit the model.
        """
        if where != "all":
            raise UsageError(
                f"plain hooks cover all positions, not {where!r}: they cannot see where a prompt ends once the KV "
                f"cache is in use. Use `with em.intervene(model, intervention, where={where!r}): ...` instead"
            )
        self.check(model)
        return [(name, self._hook(name)) for name in self.points(model)]

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def apply(x: Tensor, hook: Any) -> Tensor:
            with unlowered(x.device):
                return self.edit(x, name=name)

        return apply


class Removal(AtItsSite):
    """What removals share: to zero at every write, or around a centre at the site that the centre belongs to."""

    around: Float[Tensor, " d_model"] | Mapping[Site, Float[Tensor, " d_model"]] | Any

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

    def hook_names(self, n_layers: int) -> tuple[str, ...]:
        """Names of the hook points that are edited, as they are called on every surface."""
        if self.around is None:
            streams = ("attn_out", "mlp_out")
            writes = [f"blocks.{layer}.hook_{stream}" for layer in range(n_layers) for stream in streams]
            return ("blocks.0.hook_resid_pre", *writes)
        return tuple(site.hook_name for site in self._centres())

    def points(self, model: LensModel) -> tuple[str, ...]:
        """The same names, resolved on this model."""
        if self.around is None:
            return write_points(model)
        for site in self._centres():
            check_writable(site)
        return tuple(hook_name(model, site) for site in self._centres())


@dataclass(frozen=True, eq=False)
class Ablate(Removal):
    """Directional ablation: remove the component along a direction, to zero or to a centre.

    Args:
        direction: what to remove.
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

    direction: Direction | Any
    around: Float[Tensor, " d_model"] | Mapping[Site, Float[Tensor, " d_model"]] | Any = None

    def __post_init__(self) -> None:
        settle(self, direction=as_direction)
        self._settle_centres(len(self.direction.vector))

    def check(self, model: LensModel) -> None:
        """Raise as every intervention does; warn when an ablation to zero is known to be a hidden steer."""
        super().check(model)
        if self.around is None:
            warn_of_hidden_steer(self.direction)

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        """Set the component along the direction to the centre's (0 without one)."""
        unit, centre = self.direction.unit, self._centre(name)
        target = 0.0 if centre is None else float(centre @ unit)
        return masked(set_component(x, unit, target), x, mask)


@dataclass(frozen=True, eq=False)
class Add(AtItsSite):
    """Activation addition: add ``coefficient`` times the raw vector at the direction's site.

    Args:
        direction: what to add; its raw length counts, so that 1 is one difference in means.
        coefficient: steering coefficient, in lengths of the raw vector.

    Raises:
        UsageError: a coefficient that is no finite number.

    Example:
        >>> Add(Direction(torch.tensor([0.0, 2.0]), Site(1)), 2.0).edit(torch.tensor([[3.0, 4.0]])).tolist()
        [[3.0, 8.0]]

    Source: Turner et al. 2023, arXiv:2308.10248; Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """

    direction: Direction | Any
    coefficient: float | int | Any = 1.0

    def __post_init__(self) -> None:
        settle(self, direction=as_direction, coefficient=finite)

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        """``x + coefficient * vector``."""
        return masked(x + (self.coefficient * self.direction.vector).to(x.device, x.dtype), x, mask)


@dataclass(frozen=True, eq=False)
class Clamp(AtItsSite):
    """Keep the component along a direction between two bounds, at the direction's site.

    Args:
        direction: along which.
        low: lower bound of the component along the unit vector, in the units of the activations; ``None``: none.
        high: upper bound; ``high`` alone is activation capping.

    Raises:
        UsageError: no bound is given, or the lower is above the upper.

    Example:
        >>> Clamp(Direction(torch.tensor([0.0, 2.0]), Site(1)), high=1.0).edit(torch.tensor([[3.0, 4.0]])).tolist()
        [[3.0, 1.0]]

    Source: capping ``h - v max(0, v'h - t)``: arXiv:2601.10387.
    """

    direction: Direction | Any
    low: float | int | Any = None
    high: float | int | Any = None

    def __post_init__(self) -> None:
        settle(self, direction=as_direction, low=optional(finite), high=optional(finite))
        if self.low is None and self.high is None:
            raise UsageError("Clamp without a bound changes nothing; pass low=, high= or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise UsageError(f"low={self.low} is above high={self.high}, so no value satisfies both; swap them")

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        """Move components that lie outside the bounds onto the nearer bound."""
        target = component(x, self.direction.unit).clamp(min=self.low, max=self.high)
        return masked(set_component(x, self.direction.unit, target), x, mask)


def check_writable(site: Site) -> None:
    """Raise ``UsageError`` unless an edit at the site changes the residual stream."""
    if not site.writable:
        raise UsageError(
            f"{site} can be read but not written: on a TransformerBridge an edit there changes only what the next "
            "component reads, not the residual stream. Use resid_pre, resid_post, attn_out or mlp_out of that layer"
        )
