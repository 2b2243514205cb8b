"""Hook points: what tl_em needs of a model, and which point a name or a site means, read once per model.

``hook_dict`` is read once per model, because on TL 3.9's Bridge it is a property that rebuilds every alias: one no-op
hook per layer then costs 4 to 18 forwards. HookPoints that somebody replaces (SAELens does) are noticed and read again.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import Tensor

from tl_em.errors import UnknownHookError
from tl_em.models.sites import Site


class _StaticMembers(type(Protocol)):
    """isinstance() that calls no properties: a Bridge's ``hook_dict`` is an expensive one."""

    _MEMBERS = ("cfg", "hook_dict", "hooks", "to_tokens", "generate", "__call__")

    def __instancecheck__(cls, instance: Any) -> bool:
        return all(_has_static(instance, name) for name in cls._MEMBERS)


def _has_static(instance: Any, name: str) -> bool:
    try:
        inspect.getattr_static(instance, name)
    except AttributeError:
        return False
    return True


@runtime_checkable
class LensModel(Protocol, metaclass=_StaticMembers):
    """What tl_em needs of a model: any HookedTransformer or TransformerBridge has it, and nothing is subclassed.

    Example:
        >>> isinstance("gpt2", LensModel)
        False
    """

    cfg: Any
    """Configuration with ``n_layers``, ``d_model``, ``d_vocab``, ``n_ctx`` and ``device``."""

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Hook points by name."""
        ...

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's own context manager (tl_em uses HookPoint.add_hook instead)."""
        ...

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Text to token ids."""
        ...

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue a prompt."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass."""
        ...


@runtime_checkable
class HookPoint(Protocol):
    """TransformerLens's hook point, as far as it is used here."""

    name: Any
    fwd_hooks: list[Any]

    def add_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Attach a function to this point."""
        ...


_POINTS: WeakKeyDictionary[Any, WeakValueDictionary[str, Any]] = WeakKeyDictionary()


def hook_points(model: LensModel) -> Mapping[str, Any]:
    """All hook points of ``model`` by name, aliases included; read once per model, kept weakly.

    Args:
        model: a HookedTransformer or TransformerBridge.

    Returns:
        A mapping from names to HookPoints. Use ``hooked`` to attach to one: it notices points replaced since.
    """
    points = _POINTS.get(model)
    return _read_points(model) if points is None else points


def _read_points(model: LensModel) -> Mapping[str, Any]:
    points = WeakValueDictionary({name: point for name, point in model.hook_dict.items() if hasattr(point, "add_hook")})
    _POINTS[model] = points
    return points


def at_path(model: Any, path: str) -> Any:
    """The object at a dotted attribute path, None where there is none."""
    found = model
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def _is_current(model: LensModel, point: Any) -> bool:
    """Whether the model still runs through this very HookPoint (a path that leads nowhere cannot be checked)."""
    found = at_path(model, point.name) if point.name else None
    return found is None or found is point


def find(model: LensModel, name: str) -> Any:
    """The HookPoint that ``model`` runs through under this name now, or None."""
    for points in (hook_points, _read_points):
        point = points(model).get(name)
        if point is not None and _is_current(model, point):
            return point
    return None


def resolve(model: LensModel, names: Sequence[str]) -> list[Any]:
    found = [(name, find(model, name)) for name in names]
    unknown = [name for name, point in found if point is None]
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(hook_points(model)), n=4, cutoff=0.5)
        replaced = at_path(model, unknown[0])
        if replaced is not None:
            detail = f"a {type(replaced).__name__} stands in its place (detach it first, e.g. with model.reset_saes())."
        else:
            detail = f"near names: {', '.join(near) or 'none'}. See tl_em.models.hooks.hook_points(model) for all."
        raise UnknownHookError(
            f"The model has no hook point {', '.join(map(repr, unknown))}, so the hook would never fire and the result "
            f"would look like no effect; nothing was attached. For {unknown[0]!r}: {detail}"
        )
    return [point for _, point in found]


class ReadPoint(NamedTuple):
    """A hook point, and the norm weight and bias to apply where the point lies before them."""

    name: str
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The stream's value, given the tensor at the hook point."""
        if self.weight is not None:
            x = x * self.weight
        return x if self.bias is None else x + self.bias


def read_point(model: LensModel, site: Site) -> ReadPoint:
    """Where and how to read ``site``.

    ``mlp_in``, what the MLP reads after the norm's weight, is ``mlp.hook_in`` on a Bridge. A HookedTransformer has no
    hook point there: its ``ln2.hook_normalized`` lies before the weight, which is therefore applied to what is read
    (nothing is left to apply where the weight was folded).

    Raises:
        UnknownHookError: the model has no such site.
    """
    if site.stream == "mlp_in" and find(model, site.hook_name) is None:
        name = f"blocks.{site.layer}.ln2.hook_normalized"
        resolve(model, [name])
        norm = at_path(model, f"blocks.{site.layer}.ln2")
        return ReadPoint(name, getattr(norm, "w", None), getattr(norm, "b", None))
    resolve(model, [site.hook_name])
    return ReadPoint(site.hook_name)


def hook_name(model: LensModel, site: Site) -> str:
    """The name of the hook point at which ``site`` can be read as it is, and written if it is writable.

    Args:
        model: a HookedTransformer or TransformerBridge.
        site: layer and stream.

    Returns:
        A name in ``hook_points(model)``.

    Raises:
        UnknownHookError: the model has no such hook point.
    """
    point = read_point(model, site)
    if point.weight is not None or point.bias is not None:
        raise UnknownHookError(
            f"This model has no hook point at {site}: {point.name!r} lies before the norm's weight, so a hook there "
            f"would see something else than the MLP reads. Read it with capture(model, prompts, [site], position=…), "
            f"which applies the weight, or load the model with surface='bridge'."
        )
    return point.name
