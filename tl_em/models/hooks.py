"""Hooks that must exist, must fire, and leave nothing behind; and which point a name or a site means.

TransformerLens lets a wrong hook name pass in silence (``bridge.hooks()``), and a gated hook never fires. A result from
such a hook equals the untouched model and looks like a null finding. So: unknown names raise before anything is
attached, and a hook that did not fire in a completed forward pass raises at the end of the context.

``hook_dict`` is read once per model, because on TL 3.9's Bridge it is a property that rebuilds every alias: one no-op
hook per layer then costs 4 to 18 forwards. HookPoints that somebody replaces (SAELens does) are noticed and read again.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import Tensor, nn

from tl_em.errors import HookError, HookNotFiredError, UnknownHookError
from tl_em.models.sites import Site
from tl_em.threads import holding

HookFunction = Callable[..., Tensor | None]
Alike = Callable[[Any, int], Sequence[Hashable] | None]
"""Of a ``models.prompts.Batch`` and a length: a label for each row, equal where a hook does the same to the first so
many tokens, if these are equal; None where it is unknown.  A hook's function has this as its attribute ``alike``."""


# --- Models and their hook points -------------------------------------------------------------------------------------


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


# --- Hooks ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class _Attached:
    """One of our hooks: where it sits and how often it fired (HookPoint.add_hook asks for its repr: a short one)."""

    name: str
    point: Any
    function: HookFunction
    fired: int = 0
    handle: Any = None

    def attach(self) -> None:
        self.point.add_hook(self.run)
        self.handle = self.point.fwd_hooks[-1]

    def run(self, x: Tensor, *, hook: Any) -> Tensor | None:
        self.fired += 1
        return self.function(x, hook)

    @property
    def tokenwise(self) -> bool:
        """Whether it does to each token what it would do to that token alone."""
        return bool(getattr(self.function, "tokenwise", False))

    @property
    def alike(self) -> Alike | None:
        """Which rows it treats alike in their first tokens, where it says so."""
        return getattr(self.function, "alike", None)

    @property
    def in_place(self) -> bool:
        return any(handle is self.handle for handle in self.point.fwd_hooks)

    def detach(self) -> None:
        if self.handle is not None:
            self.handle.hook.remove()
            self.point.fwd_hooks[:] = [handle for handle in self.point.fwd_hooks if handle is not self.handle]
            self.handle = None  # it holds the hook, which holds this: what it read would stay until Python looks for it


_ATTACHED: WeakKeyDictionary[Any, list[_Attached]] = WeakKeyDictionary()
"""Our hooks on each model."""


def reads_in_pieces(model: LensModel) -> bool:
    """Whether a prompt may be read in several passes: nothing on the model but hooks that treat tokens one by one.

    Somebody else's may tell a prompt by the width of a pass, or mean the prompt's end by the last token of a pass.
    """
    return _nothing_but(model, [hook for hook in _ATTACHED.get(model, ()) if hook.tokenwise])


def labelling(model: LensModel) -> Alike | None:
    """What labels the rows of a batch: hooks do to the first tokens of rows of one label the same.

    Args:
        model: with all hooks on it.

    Returns:
        A function that gives None where a hook does not know; None where a hook does not say at all.
    """
    own = [hook for hook in _ATTACHED.get(model, ()) if hook.alike is not None]
    if not _nothing_but(model, own):
        return None
    functions = list(dict.fromkeys(hook.alike for hook in own if hook.alike is not None))

    def labels(batch: Any, length: int) -> list[Hashable] | None:
        found = [alike(batch, length) for alike in functions]
        known = [each for each in found if each is not None]
        return list(zip([0] * len(batch.rows), *known, strict=True)) if len(known) == len(found) else None

    return labels


def attached_names(model: LensModel) -> list[str]:
    """Where hooks of this package wait on a model now."""
    return list(dict.fromkeys(hook.name for hook in _ATTACHED.get(model, ())))


def _nothing_but(model: LensModel, hooks: Sequence[_Attached]) -> bool:
    """Whether no other hook waits on a model or on one of its modules."""
    own = [hook.handle for hook in hooks]
    points = {id(point): point for point in hook_points(model).values()}.values()
    there = [handle for point in points for handle in getattr(point, "fwd_hooks", ()) if not _is_built_in(handle)]
    if any(all(handle is not each for each in own) for handle in there):
        return False
    whole = [each for each in (model, getattr(model, "original_model", None)) if isinstance(each, nn.Module)]
    modules = {id(module): module for each in whole for module in each.modules()}.values()
    of_torch = [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return all(str(getattr(hook, "__module__", "")).startswith(_KNOWN) for hook in of_torch)


def _is_built_in(handle: Any) -> bool:
    """Whether TransformerLens built a hook into the model (one that passes on to a point of another name)."""
    module = str(getattr(getattr(handle, "user_hook", None), "__module__", ""))
    return bool(getattr(handle, "is_permanent", False)) and module.startswith(_KNOWN[0])


_KNOWN = ("transformer_lens.", "transformers.", "tl_em.")
"""Whose hooks on modules are known; those at hook points are TransformerLens's to torch, and are asked for above."""


@contextmanager
def hooked(model: LensModel, hooks: Sequence[tuple[str, HookFunction]], *, check: bool = True) -> Iterator[LensModel]:
    """Run the model with hooks: names checked before anything is attached, firing checked at the end.

    Hooks that were there before stay, in order, before these; on exit exactly these are removed, also after an
    exception. Contexts nest.

    Args:
        model: a HookedTransformer or TransformerBridge.
        hooks: pairs of a hook point's name and a function ``(x, hook) -> Tensor | None`` (None leaves ``x``).
        check: whether to raise when a hook never fired.

    Yields:
        The model.

    Raises:
        UnknownHookError: a name that the model does not have (nothing is attached).
        HookNotFiredError: at the end, when a completed forward pass from the embedding to the logits ran inside, and a
            hook fired zero times. Never in place of an exception raised inside; never when nothing, or only part of the
            model (``stop_at_layer``), was run.
        HookError: at the end, when somebody removed the hooks inside the context (``model.reset_hooks()``).
        InUseError: another thread has such a context open on this model. While one of its verbs runs, this one waits.
    """
    with holding(model, left_open=True), _attaching(model, hooks, check):
        yield model


@contextmanager
def _attaching(model: LensModel, hooks: Sequence[tuple[str, HookFunction]], check: bool) -> Iterator[None]:
    points = resolve(model, [name for name, _ in hooks])
    attached = [_Attached(name, point, function) for (name, function), point in zip(hooks, points, strict=True)]
    with ExitStack() as stack:
        for hook in attached:
            stack.callback(hook.detach)
            hook.attach()
        _ATTACHED[model] = [*_ATTACHED.get(model, ()), *attached]
        stack.callback(lambda: _ATTACHED.update({model: [each for each in _ATTACHED[model] if each not in attached]}))
        completed = stack.enter_context(_full_passes(model))
        yield
        removed = [hook.name for hook in attached if not hook.in_place]
    if check:
        _check_fired(attached, removed, len(completed))


def _check_fired(attached: Sequence[_Attached], removed: Sequence[str], completed: int) -> None:
    if removed:
        raise HookError(
            f"Hooks at {sorted(set(removed))} were removed while their context was open, so what ran afterwards ran "
            f"without them. Do not call model.reset_hooks() inside; its hooks() and run_with_hooks() nest."
        )
    silent = [hook.name for hook in attached if not hook.fired]
    if completed and silent:
        raise HookNotFiredError(
            f"{completed} full forward pass(es) ran and the hooks at {sorted(set(silent))} never fired, so the result "
            f"is that of the model without them. The point may be gated (model.cfg.use_attn_result and the like) or "
            f"lie off the path that was run; pick another site or open the gate."
        )


@contextmanager
def _full_passes(model: LensModel) -> Iterator[list[bool]]:
    """A list that grows with every forward pass that ran from the first block's input to the logits.

    Seen from inside, at the first block and at the unembedding, because ``generate`` and ``run_with_hooks`` of a
    HookedTransformer call ``forward`` directly, where a hook on the model itself would not fire. A pass that stops
    early, or starts late, does not do both.
    """
    points, last = hook_points(model), getattr(model, "unembed", None)
    first: nn.Module | None = points.get("blocks.0.hook_resid_pre")
    if not isinstance(last, nn.Module):
        last = points.get(f"blocks.{int(model.cfg.n_layers) - 1}.hook_resid_post")
    began, completed = False, []

    def begin(*_: Any) -> None:
        nonlocal began
        began = True

    def end(*_: Any) -> None:
        nonlocal began
        completed.extend([True] * began)
        began = False

    with ExitStack() as stack:
        if first is not None and last is not None:
            stack.callback(first.register_forward_hook(begin).remove)
            stack.callback(last.register_forward_hook(end).remove)
        yield completed
