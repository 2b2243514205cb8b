"""What an intervention is: a frozen value with a site and a pure edit; all else has a default.

    x  ->  edit(x) where the mask holds, x elsewhere          x [... d_model], at each of the value's hook points

Whoever brings a new one writes a dataclass with ``edit`` and a ``site``; the framework sees to the mask, the dtype, the
hook points, strengths (``Partial``) and random directions in place of its own.  A value that holds another one in
``inner`` (a wrapper) takes from it whatever it does not say itself.

An effect counts as a direction's own only beside random directions with the same treatment
(``directions.geometry.control_directions``).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_em.arguments import FRACTION, checked, finite, settle
from tl_em.directions.direction import Direction
from tl_em.directions.profile import Profile, check_all_fit
from tl_em.errors import UsageError
from tl_em.models.hooks import LensModel, hook_name
from tl_em.models.residual_writes import write_points
from tl_em.models.sites import Site, as_site
from tl_em.models.torch_state import unlowered

Activation = Float[Tensor, "*axes d_model"]
Hook = tuple[str, Callable[..., Tensor]]
RowEdit = Callable[[Tensor, Tensor, str | None], Tensor]
EveryWrite = Literal["every write"]
EVERY_WRITE: EveryWrite = "every write"
"""In place of ``sites``: the embedding and what each block's parts add to the residual stream."""


# --- What the framework guarantees ------------------------------------------------------------------------------------


def masked(edited: Activation, x: Activation, mask: Bool[Tensor, "*axes"] | None) -> Activation:
    """The edit where ``mask`` holds, the original elsewhere; everywhere without a mask."""
    return edited if mask is None else torch.where(mask[..., None].to(x.device), edited, x)


def _guarded(edit: Callable[..., Any]) -> Callable[..., Tensor]:
    """``edit`` with whatever of mask and name it takes; then the mask is applied, and what came back is looked at."""
    if hasattr(edit, "guarded"):
        return edit
    parameters = inspect.signature(edit).parameters
    everything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    takes = [word for word in ("mask", "name") if everything or word in parameters]

    @functools.wraps(edit)
    def guarded(self: Any, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        given = {"mask": mask, "name": name}
        version = None if x.is_inference() else x._version
        edited = edit(self, x, **{word: given[word] for word in takes})
        changed = version is not None and x._version != version
        wrong = "x itself, changed in place" if changed else _wrong(edited, x)
        if wrong:
            raise UsageError(
                f"{type(self).__name__}.edit{f' at {name}' if name else ''} returned {wrong}, so what the model reads "
                f"next would mean nothing. Return a new tensor {tuple(x.shape)} of {x.dtype}, finite where x is: "
                "compute in float32 and end with .to(x.dtype)"
            )
        return masked(edited, x, mask)

    guarded.__dict__["guarded"] = True
    return guarded


def _wrong(edited: Any, x: Tensor) -> str | None:
    """What is wrong with an edit; where the numbers are so large that the model overflows, NaN is not the edit's."""
    if not isinstance(edited, Tensor):
        return f"a {type(edited).__name__}"
    if edited.shape != x.shape or edited.dtype != x.dtype:
        return f"shape {tuple(edited.shape)} of {edited.dtype}"
    if not math.isnan(edited.detach().sum()) or not bool(edited.isnan().any()):  # the sum first: one number to wait for
        return None
    return "NaN" if float(x.detach().abs().max()) < torch.finfo(x.dtype).max ** 0.5 else None


# --- The base class ---------------------------------------------------------------------------------------------------


class Intervention:
    """An edit of activations at one or several sites: subclass it, and write ``edit`` and a ``site``.

    A subclass is a frozen dataclass. It says where it acts by a field or property ``site`` (a Site), ``sites`` (several
    of them, or ``"every write"``: wherever something is written to the residual stream), or by holding its Direction
    (or Profile) in ``direction``, at whose site (or sites) it then acts. ``edit(x, mask=None)`` takes activations
    [... d_model] and gives new ones of the same shape and dtype; ``name`` is passed too (that of the hook point) where
    its signature has it.

    Positions outside of ``mask`` stay what they were, whatever ``edit`` returns there.

    Example:
        >>> from tl_em.models.sites import Site
        >>> @dataclass(frozen=True, eq=False)
        ... class Shrink(Intervention):
        ...     site: Site
        ...     factor: float = 0.5
        ...     def edit(self, x, mask=None):
        ...         return self.factor * x
        >>> Shrink(Site(1)).edit(torch.ones(2, 3), torch.tensor([True, False])).tolist()
        [[0.5, 0.5, 0.5], [1.0, 1.0, 1.0]]
        >>> Shrink(Site(1)).at(0.5).edit(torch.ones(1, 3)).tolist()
        [[0.75, 0.75, 0.75]]

    Source: the value ``x`` at a hook point and what replaces it, as in TransformerLens's own hooks.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "edit" in vars(cls):
            cls.edit = _guarded(vars(cls)["edit"])  # pyright: ignore[reportAttributeAccessIssue]

    # --- What a subclass writes ---

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        """The new activations.

        Args:
            x: [... d_model], in the units and the dtype of the model.
            mask: [...], which positions are edited; all without one. Only a hint: the rest is put back in any case.
            name: of the hook point.

        Returns:
            A new tensor [... d_model] of the same dtype.

        Raises:
            UsageError: it was changed in place, has another shape or dtype, or holds NaN where ``x`` does not.
        """
        inner = _inner(self)
        if inner is None:
            raise UsageError(f"{type(self).__name__} has no edit(x, mask=None), so it changes nothing; write one")
        return inner.edit(x, mask, name=name)

    # --- What it may say otherwise ---

    @property
    def strongest(self) -> float:
        """The largest strength that ``at`` takes: 1, or infinity where there is a coefficient, of either sign."""
        inner = _inner(self)
        return 1.0 if inner is None else inner.strongest

    @checked(strength=finite)
    def at(self, strength: float) -> Intervention:
        """The same at another strength: 0 changes nothing, 1 is the value itself; by default a part of the edit.

        Raises:
            UsageError: a strength that it does not have.
        """
        inner = _inner(self)
        return Partial(self, strength) if inner is None else self.around_another(inner.at(strength))

    @checked()
    def along(self, direction: Direction | Profile) -> Intervention:
        """The same with another direction in place of its own; with another profile in place of a profile.

        Raises:
            UsageError: it has none.
        """
        inner = _inner(self)
        if inner is not None:
            return self.around_another(inner.along(direction))
        if not isinstance(direction, type(directed_by(self))) or not _has_field(self, "direction"):
            raise UsageError(
                f"{type(self).__name__} has no direction that another one could replace; hold it in a field "
                "`direction`, or pass interventions of the same kind as controls"
            )
        return replace(self, direction=direction)  # pyright: ignore[reportArgumentType]

    def rowwise(self, vectors: Float[Tensor, "direction d_model"]) -> RowEdit:
        """The same for a batch whose rows are edited along different directions; by default row by row.

        Args:
            vectors: in place of its own direction.

        Returns:
            ``edit(x, rows, name)``: row i of ``x`` [row pos d_model] is edited along ``vectors[rows[i]]``.
        """
        own = direction_of(self)
        each = [self.along(replace(own, vector=vector)) for vector in vectors] if own is not None else []

        def edit(x: Tensor, rows: Tensor, name: str | None = None) -> Tensor:
            return torch.stack([each[k].edit(row, name=name) for row, k in zip(x, rows.tolist(), strict=True)])

        return edit

    def around_another(self, inner: Intervention) -> Intervention:
        """The same wrapper around another intervention."""
        return replace(self, inner=inner)  # pyright: ignore[reportArgumentType]

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What must hold of a prompt for it to be edited, each with a ``direction`` and ``holds(x)``; often nothing."""
        inner = _inner(self)
        return () if inner is None else inner.conditions

    @property
    def tokenwise(self) -> bool:
        """Whether ``edit`` does to each token what it does to that token alone; all of this package's do.

        Then ``em.generate`` answers prompts of several lengths together.  Of one of your own it is unknown, and False,
        unless the class says ``tokenwise = True``.
        """
        inner = _inner(self)
        return type(self).__module__.startswith(__package__ or "") if inner is None else inner.tokenwise

    @property
    def linear(self) -> bool:
        """Whether ``edit`` is a linear map: together with ``sites = "every write"`` it has a form in the weights."""
        return False

    @checked()
    def check(self, model: LensModel) -> None:
        """Raise ``WidthError`` or ``ProvenanceError`` unless this belongs on the model."""
        inner, directed = _inner(self), directed_by(self)
        if inner is not None:
            inner.check(model)
        elif directed is not None:
            check_all_fit(directed, model)

    # --- What follows from that ---

    def hook_names(self, n_layers: int) -> tuple[str, ...]:
        """Names of the hook points that are edited, as they are called on every surface."""
        inner = _inner(self)
        if inner is not None:
            return inner.hook_names(n_layers)
        sites = sites_of(self)
        if sites == EVERY_WRITE:
            streams = ("attn_out", "mlp_out")
            writes = [f"blocks.{layer}.hook_{stream}" for layer in range(n_layers) for stream in streams]
            return ("blocks.0.hook_resid_pre", *writes)
        return tuple(site.hook_name for site in sites)

    def points(self, model: LensModel) -> tuple[str, ...]:
        """The same names, resolved on this model.

        Raises:
            UnknownHookError: the model has no such site.
            UsageError: there is no site, or it can be read but not written.
        """
        inner = _inner(self)
        if inner is not None:
            return inner.points(model)
        sites = sites_of(self)
        if sites == EVERY_WRITE:
            return write_points(model)
        for site in sites:
            _check_writable(site)
        return tuple(hook_name(model, site) for site in sites)

    @checked()
    def hooks(self, model: LensModel, where: str = "all") -> list[Hook]:
        """Plain ``(hook_name, fn)`` pairs for ``model.run_with_hooks(tokens, fwd_hooks=...)``, at all positions.

        Args:
            model: the model that they will run on; the direction is checked against it.
            where: only ``"all"``: a plain hook does not know which token is prompt and which is answer.

        Raises:
            UsageError: another scope was asked for, or there is a condition.
            ProvenanceError, WidthError: the direction does not fit the model.
        """
        if where != "all":
            raise UsageError(
                f"plain hooks cover all positions, not {where!r}: they cannot see where a prompt ends once the KV "
                f"cache is in use. Use `with em.intervene(model, intervention, where={where!r}): ...` instead"
            )
        if self.conditions:
            raise UsageError(
                "plain hooks cannot apply a condition: they see neither where a prompt ends nor, under the KV cache, "
                "the prompt at all. Use `with em.intervene(model, conditional): em.generate(model, ...)` instead"
            )
        self.check(model)
        return [(name, self._hook(name)) for name in self.points(model)]

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def apply(x: Tensor, hook: Any) -> Tensor:
            with unlowered(x.device):
                return self.edit(x, name=name)

        return apply


@dataclass(frozen=True, eq=False)
class Partial(Intervention):
    """An intervention carried out in part: ``x -> x + s (edit(x) - x)``, for 0 <= s <= 1.

    Half an ablation to zero halves the component at every write, and therefore in the whole residual stream.  With it,
    edits that have no coefficient of their own can be given the same push as others (``calibrate``), which is what
    makes the effect of a direction comparable with that of a random one.

    Args:
        inner: the intervention.
        strength: 0 changes nothing, 1 is the whole.

    Raises:
        UsageError: a strength outside 0 to 1.

    Example:
        >>> from tl_em.interventions.edits import Ablate
        >>> half = Partial(Ablate(Direction(torch.tensor([0.0, 2.0]), Site(1))), 0.5)
        >>> half.edit(torch.tensor([[3.0, 4.0]])).tolist()
        [[3.0, 2.0]]
    """

    inner: Intervention | Any
    strength: float | int | Any

    def __post_init__(self) -> None:
        settle(self, inner=as_intervention, strength=FRACTION)

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        """``x + strength * (inner.edit(x) - x)``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide + self.strength * (self.inner.edit(x, name=name) - wide)).to(x.dtype)


# --- Reading one ------------------------------------------------------------------------------------------------------

_OLD_MEMBERS = ("check", "hook_names", "points", "edit", "hooks")


def as_intervention(name: str, value: Any) -> Intervention:
    """``value``, if it is an intervention; anything with the members of one is taken as one.

    Raises:
        UsageError: anything else.
    """
    if isinstance(value, Intervention):
        return value
    if not isinstance(value, type) and all(callable(getattr(value, member, None)) for member in _OLD_MEMBERS):
        return _Foreign(value)
    raise UsageError(
        f"{name}: {type(value).__name__} is not an intervention; wrap a direction in em.Ablate, em.Add or em.Clamp, or "
        "write a subclass of em.Intervention with edit(x, mask) and a site"
    )


def sites_of(intervention: Intervention) -> tuple[Site, ...] | EveryWrite:
    """Where it acts.

    Raises:
        UsageError: it does not say.
    """
    intervention, directed = core(intervention), directed_by(intervention)
    given = getattr(intervention, "sites", None)
    if given is None:
        site = getattr(intervention, "site", None) or (directed.site if isinstance(directed, Direction) else None)
        given = (site,) if site else directed.sites if isinstance(directed, Profile) else ()
    label = type(intervention).__name__
    if not given:
        raise UsageError(
            f"{label} has no site, so it is unknown where it acts; give the class a field or a property `site`, "
            "em.Site(layer), or a Direction in `direction`"
        )
    return EVERY_WRITE if given == EVERY_WRITE else tuple(as_site(f"{label}'s site", each) for each in given)


def core(intervention: Intervention) -> Intervention:
    """What edits, inside of conditions, parts and other wrappers."""
    inner = _inner(intervention)
    return intervention if inner is None else core(inner)


def direction_of(intervention: Intervention) -> Direction | None:
    """The direction along which it edits, if there is one."""
    direction = getattr(core(intervention), "direction", None)
    return direction if isinstance(direction, Direction) else None


def directed_by(intervention: Intervention) -> Direction | Profile | None:
    """The direction or the profile along which it edits, if there is one."""
    directed = getattr(core(intervention), "direction", None)
    return directed if isinstance(directed, Direction | Profile) else None


def _inner(intervention: Any) -> Intervention | None:
    inner = getattr(intervention, "inner", None)
    return inner if inner is None else as_intervention("inner", inner)


def _has_field(value: Any, name: str) -> bool:
    return is_dataclass(value) and name in {field.name for field in fields(value)}


@dataclass(frozen=True, eq=False)
class _Foreign(Intervention):
    """An object of somebody's own with the members of an intervention."""

    value: Any

    @property
    def direction(self) -> Any:
        return getattr(self.value, "direction", None)

    @property
    def tokenwise(self) -> bool:
        return bool(getattr(self.value, "tokenwise", False))

    def along(self, direction: Direction | Profile) -> Intervention:
        return _Foreign(replace(self.value, direction=direction))

    def check(self, model: LensModel) -> None:
        self.value.check(model)

    def hook_names(self, n_layers: int) -> tuple[str, ...]:
        return self.value.hook_names(n_layers)

    def points(self, model: LensModel) -> tuple[str, ...]:
        return self.value.points(model)

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        return self.value.edit(x, mask, name=name)


def _check_writable(site: Site) -> None:
    if not site.writable:
        raise UsageError(
            f"{site} can be read but not written: on a TransformerBridge an edit there changes only what the next "
            "component reads, not the residual stream. Use resid_pre, resid_post, attn_out or mlp_out of that layer"
        )
