"""Next-token logits, token after token: with the keys and values of what was read kept, or with everything read again.

Each surface keeps a cache in its own way, and it has gone wrong without an error: transformers 5.24 renamed the
argument that carries it, after which every step of a Bridge saw one token. So the cache is handed over here, under the
name that the model itself declares, and ``proof`` compares what comes out with reading everything again.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_em.models.hooks import LensModel
from tl_em.models.unwrapped import unwrapped

Step = Callable[[Int[Tensor, "prompt pos"]], Float[Tensor, "prompt d_vocab"]]
"""Read more tokens of every prompt; logits after the last of them."""

_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers calls the cache, newest name first."""


@contextmanager
def steps(model: LensModel, *, cached: bool) -> Iterator[Step]:
    """A function that reads tokens of unpadded prompts, some at a time, and gives the logits after the last.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        cached: whether a call reads its own tokens alone, with what earlier calls read taken from the cache; else every
            call reads all tokens again.
    """
    with ExitStack() as stack:
        if not cached:
            yield _reading_again(model)
        elif hasattr(model, "original_model"):
            yield _bridge_steps(model, stack)
        else:
            yield _hooked_steps(model)


def has_cache(model: LensModel) -> bool:
    """Whether the model takes a cache that this module knows how to hand over."""
    if hasattr(model, "original_model"):
        return _cache_name(model) is not None
    return "past_kv_cache" in inspect.signature(getattr(model, "forward", model)).parameters


def _reading_again(model: LensModel) -> Step:
    read: list[Tensor] = []

    def step(tokens: Tensor) -> Tensor:
        read.append(tokens)
        return model(torch.cat(read, 1).to(model.cfg.device), padding_side="right")[:, -1]

    return step


def _hooked_steps(model: LensModel) -> Step:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    held: Any = None

    def step(tokens: Tensor) -> Tensor:
        nonlocal held
        tokens = tokens.to(model.cfg.device)
        if held is None:
            held = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, len(tokens))
        # Given no mask, a HookedTransformer takes pad tokens at an end of a prompt for padding; nothing here is padded.
        return model(tokens, past_kv_cache=held, attention_mask=torch.ones_like(tokens), padding_side="right")[:, -1]

    return step


def _bridge_steps(model: Any, stack: ExitStack) -> Step:
    """Through the Bridge, so that all its hooks fire, with the cache of the Hugging Face model inside."""
    name, held, own = _cache_name(model), None, threading.get_ident()
    assert name is not None
    attentions = _attentions(model)  # all of them, before some give way to what they wrap
    stack.enter_context(unwrapped(model))  # before this function's own hooks

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal held
        if threading.get_ident() == own:  # another thread may run the same model
            held = getattr(output, name, None)

    stack.callback(model.original_model.register_forward_hook(keep).remove)
    for attention in attentions:
        stack.callback(attention.register_forward_pre_hook(_under_the_name_that_is_read, with_kwargs=True).remove)
    takes = inspect.signature(model.original_model.forward).parameters
    options: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in takes else {})

    def step(tokens: Tensor) -> Tensor:
        given = {} if held is None else {name: held}
        return model(tokens.to(model.cfg.device), padding_side="right", **options, **given)[:, -1]

    return step


def _cache_name(model: Any) -> str | None:
    takes = inspect.signature(model.original_model.forward).parameters
    return next((name for name in _NAMES if name in takes), None)


_ATTENTIONS: WeakKeyDictionary[Any, tuple[nn.Module, ...]] = WeakKeyDictionary()


def _attentions(model: Any) -> tuple[nn.Module, ...]:
    """The attention modules of TransformerLens that update the cache themselves: they look for it under one name."""
    found = _ATTENTIONS.get(model)
    if found is None:
        found = tuple(module for module in model.modules() if hasattr(module, "_update_kv_cache"))
        _ATTENTIONS[model] = found
    return found


def _under_the_name_that_is_read(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
    held = next((options[name] for name in (*_NAMES, "layer_past") if options.get(name) is not None), None)
    if held is None or options.get("past_key_values") is not None:
        return None
    return args, options | {"past_key_values": held}
