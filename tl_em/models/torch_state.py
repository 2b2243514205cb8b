"""The state of torch that numbers are made in: one rule for the whole package, in one place.

A caller may stand in inference mode, under autocast, with another default dtype or device, or hold a model that was
left in training mode. Each of these changes numbers in silence, or ends in somebody else's error far from its cause.
The rule: **what this package computes, it computes with the model in evaluation mode, in the model's own dtype, without
gradients, and with float32 on the CPU for its own arrays; and afterwards everything is as it was.** Results are plain
tensors, also where they were made in inference mode. Meanwhile the models belong to the thread (``tl_em.threads``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from tl_em.threads import RANDOM, alone, holding

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def plain_torch(*models: Any) -> Iterator[None]:
    """Evaluation mode for the models and torch's plain state, until the block ends.

    Args:
        *models: modules whose dropout must not act; what is no module is passed over.

    Example:
        >>> layer = nn.Dropout(0.5)
        >>> with plain_torch(layer):
        ...     layer(torch.ones(2)).tolist(), layer.training
        ([1.0, 1.0], False)
        >>> layer.training
        True
    """
    modules = [model for model in models if isinstance(model, nn.Module)]
    with holding(*modules), ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        if torch.get_default_dtype() != torch.float32:
            stack.enter_context(alone())
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for model in modules:
            _put_in_evaluation(model, stack)
        for kind in _autocast(*modules):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def making_weights() -> Iterator[None]:
    """The same while weights are made: with gradients; the random state is put back."""
    with holding(RANDOM), torch.random.fork_rng(devices=[]), plain_torch(), torch.enable_grad():
        yield


def _put_in_evaluation(model: nn.Module, stack: ExitStack) -> None:
    """Module by module: ``model.eval()`` and ``model.train()`` would forget which of them were in training mode.

    A Bridge holds the model that it stands for, its dropouts included, where ``modules()`` does not look.
    """
    inner = getattr(model, "original_model", None)
    for part in (model, inner) if isinstance(inner, nn.Module) else (model,):
        for module in _modules(part):
            if module.training:
                module.training = False
                stack.callback(setattr, module, "training", True)


def _modules(whole: nn.Module) -> Iterator[nn.Module]:
    """``whole.modules()``, which puts together a name for each: on a Bridge that takes as long as a few layers."""
    seen, waiting = {id(whole)}, [whole]
    while waiting:
        yield (module := waiting.pop())
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


def _autocast(*models: Any) -> list[str]:
    """Kinds of devices under autocast, of those that matter."""
    kinds = {"cpu", "cuda", *(torch.device(model.cfg.device).type for model in models if hasattr(model, "cfg"))}
    return [kind for kind in sorted(kinds - {"meta"}) if torch.is_autocast_enabled(kind)]


def in_plain_torch(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run in ``plain_torch`` with the modules among its arguments in evaluation mode."""

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        with plain_torch(*_models_in(*args, *kwargs.values())):
            return function(*args, **kwargs)

    return plain


def _models_in(*values: Any) -> Iterator[nn.Module]:
    """Models, those of pairs and of objects that carry one, and lists of either."""
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, list | tuple):
            yield from _models_in(*(each for each in value if not isinstance(each, str | int | list | tuple)))
        elif isinstance(value, Mapping):
            yield from _models_in(*(each for each in value.values() if not isinstance(each, list | tuple)))
        else:
            held = getattr(value, "__dict__", {})
            yield from (held[name] for name in _CARRIED if isinstance(held.get(name), nn.Module))


_CARRIED = ("base", "tuned", "model")
"""Under which names pairs, judges and the like carry models."""


def unlowered(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off where it is on: a hook's arithmetic in the dtype that it asks for, in the caller's own passes."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def plain(tensor: Tensor) -> Tensor:
    """A copy, detached, that works in and outside inference mode alike."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()
