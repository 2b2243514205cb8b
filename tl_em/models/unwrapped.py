"""A Bridge run through the modules that it wraps, wherever no hook asks for its own.

A TransformerBridge puts a component around every module of the Hugging Face model, and computes attention, MLPs and
norms in code of its own, so that hooks can wait between their steps: in a pass over one token, a third of the time goes
there.  Inside :func:`unwrapped` a component without a hook gives way to the module that it wraps; one with hooks at its
two ends alone (the residual stream, what attention and MLP write), to that module between these two hook points; any
other stays.  That both ways compute the same, at every such hook point, is part of ``proof``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_em.models.hooks import LensModel, find, hooked
from tl_em.models.sites import Site, Stream

WRAPPED, ENDS = "_original_component", ("hook_in", "hook_out")
_STREAMS: tuple[Stream, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")
_OWN = "transformer_lens."
_FLAGS = ("use_split_qkv_input", "use_attn_in", "use_attn_result", "use_hook_mlp_in")
"""Each makes a component pass something to its neighbour, beside what the wrapped modules pass on."""
_SHOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_KEPT: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def allow_unwrapped(model: Any, shown: bool) -> None:
    """Remember whether a model was shown to compute the same without its components."""
    _SHOWN[model] = shown


@contextmanager
def through_components(model: Any) -> Iterator[None]:
    """Inside, a pass goes through the components, as where a hook waits in each of them."""
    shown = _SHOWN.get(model, False)
    allow_unwrapped(model, False)
    try:
        yield
    finally:
        allow_unwrapped(model, shown)


def can_unwrap(model: Any) -> bool:
    """Whether a model is a Bridge that was shown to compute the same without its components, in the state it is in."""
    flags = any(getattr(model.cfg, name, False) for name in _FLAGS)
    return _SHOWN.get(model, False) and not flags and not getattr(model, "compatibility_mode", False)


def allow_components(model: Any, kept: bool) -> None:
    """Remember whether a Bridge's components keep keys and values (those of ALiBi on TransformerLens 3.9 do not)."""
    _KEPT[model] = kept


def keeps_cache(model: Any) -> bool:
    """Whether keys and values are kept with the hooks that wait now: a hook in attention makes its component run."""
    if _KEPT.get(model, True):
        return True
    with unwrapped(model):
        return not any(hasattr(module, "_update_kv_cache") for module in model.original_model.modules())


@contextmanager
def unwrapped(model: Any) -> Iterator[None]:
    """Inside, a pass goes through the wrapped modules where no hook waits; nothing changes where that was not shown.

    Args:
        model: with all hooks on it; one that is added inside may sit where nothing passes.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        if can_unwrap(model):
            _unwrap_(model.original_model, replaced)
        yield
    finally:
        for module, name, component in replaced:
            module._modules[name] = component


def unwrapped_gap(model: LensModel, tokens: Int[Tensor, "prompt pos"]) -> float | None:
    """How far what is read at the hook points, and the logits, differ between the two ways, under an edit at each.

    Args:
        model: without hooks.
        tokens: a short prompt.

    Returns:
        The largest difference in standard deviations of what is read; None where there is nothing to unwrap.
    """
    if not isinstance(getattr(model, "original_model", None), nn.Module):
        return None
    sites = [Site(layer, stream) for layer in range(int(model.cfg.n_layers)) for stream in _STREAMS]
    names = [site.hook_name for site in sites if find(model, site.hook_name) is not None]
    read: list[list[Tensor]] = []

    def edit(x: Tensor, hook: Any) -> Tensor:
        read[-1].append(x.float().cpu())
        return x * (1 + 2**-6)

    for shown in (False, True):
        allow_unwrapped(model, shown)
        read.append([])
        with torch.no_grad(), hooked(model, [(n, edit) for n in names], check=False), unwrapped(model):
            read[-1].append(model(tokens.to(model.cfg.device), padding_side="right").float().cpu())
    allow_unwrapped(model, False)
    if len(read[0]) != len(read[1]):
        return float("inf")
    pairs = zip(*read, strict=True)
    return max(float(((a - b).abs().max() / a.std().clamp_min(1e-12)).nan_to_num(torch.inf)) for a, b in pairs)


class _Between(nn.Module):
    """A wrapped module between the hook points at the ends of its component."""

    def __init__(self, inside: nn.Module, component: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.__dict__.update(first=component._modules[ENDS[0]], last=component._modules[ENDS[1]])

    def __getattr__(self, name: str) -> Any:
        """What a model asks of its blocks (the kind of their attention, say)."""
        found = self._modules.get(name)
        return getattr(self._modules["inside"], name) if found is None else found

    def forward(self, *args: Any, **options: Any) -> Any:
        if args:
            args = (self.first(args[0]), *args[1:])
        else:
            options["hidden_states"] = self.first(options["hidden_states"])
        out = self.inside(*args, **options)
        return self.last(out) if isinstance(out, Tensor) else (self.last(out[0]), *out[1:])


def _unwrap_(module: nn.Module, replaced: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """In a module of the Hugging Face model and below it; what a component that stays wraps is unwrapped inside."""
    for name, child in module._modules.items():
        if child is None:
            continue
        inside = child._modules.get(WRAPPED)
        if inside is not None and (instead := _instead(child, inside)) is not None:
            module._modules[name] = instead
            replaced.append((module, name, child))
        _unwrap_(child if inside is None else inside, replaced)


def _instead(component: nn.Module, inside: nn.Module) -> nn.Module | None:
    """What computes the same in its place: the wrapped module, bare or between two hook points; None if nothing does.

    A hook in another component that the wrapped module calls itself (the attention of a block) waits there as before.
    """
    called = {id(each) for each in inside._modules.values()}
    parts = [(name, each) for name, each in component._modules.items() if each is not None and name != WRAPPED]
    nested = [each for _, each in parts if id(each) not in called]
    ends = [each for name, each in parts if name in ENDS]
    if _is_watched(component) or any(_watched(each) for each in nested if all(each is not end for end in ends)):
        return None
    if not any(map(_is_watched, ends)):
        return inside
    return _Between(inside, component) if len(ends) == 2 else None


def _watched(component: nn.Module) -> bool:
    """Whether a hook waits anywhere in a component, without what it wraps."""
    parts = (each for name, each in component._modules.items() if each is not None and name != WRAPPED)
    return _is_watched(component) or any(map(_watched, parts))


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook waits at this very module, or it is not TransformerLens's.

    Components pass a few things among each other by hooks of their own, which the wrapped modules do without.
    """
    point = hasattr(module, "add_hook") and hasattr(module, "fwd_hooks")
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    theirs = any(point or not str(getattr(hook, "__module__", "")).startswith(_OWN) for hook in hooks)
    return theirs or "forward" in vars(module) or not type(module).__module__.startswith(_OWN)
