"""Next-token logits, token after token: with the keys and values of what was read kept, or with everything read again.

Each surface keeps a cache in its own way, and it has gone wrong without an error: transformers 5.24 renamed the
argument that carries it, after which every step of a Bridge saw one token. So the cache is handed over here, under the
name that the model itself declares, and ``proof`` compares what comes out with reading everything again.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_em.errors import ModelError
from tl_em.models.hooks import LensModel
from tl_em.models.source_record import text_config
from tl_em.models.unwrapped import unwrapped

Step = Callable[[Int[Tensor, "prompt pos"]], Float[Tensor, "prompt d_vocab"]]
"""Read more tokens of every prompt; logits after the last of them."""

Rows = Sequence[int] | Callable[[int], Sequence[int]] | None
"""Which rows of what was read are gone on with, each as often as it is named: everywhere, or by layer; None for all."""


@runtime_checkable
class ReadsOn(Protocol):
    """Reads on after what it read before."""

    @property
    def held(self) -> Any:
        """Keys and values of what was read so far, None of nothing."""
        ...

    def __call__(self, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "row last d_vocab"]:
        """Logits of these tokens, of the last of them, or of those that a hook hands the unembedding as one row."""
        ...

    def go_on(self, held: Any, rows: Rows, *, last: bool = False) -> None:
        """Go on after what was held at some time, which stays as it is.

        After the ``last`` nothing is read on: keys and values of a layer are gone once the pass is through it.
        """
        ...

    def align(self, lengths: Int[Tensor, " prompt"]) -> None:
        """Go on after so many tokens of each row, what stands behind them (padding) forgotten.

        Keys and values of every row are moved to the end of the cache, as if the prompts had been padded on the left.
        """
        ...


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
    if not cached:
        yield _reading_again(model)
        return
    with reading_on(model, last=True) as read:
        yield lambda tokens: read(tokens)[:, -1]


@contextmanager
def reading_on(model: LensModel, *, last: bool = False) -> Iterator[ReadsOn]:
    """A function that reads more tokens of every prompt after those that it read before, and gives their logits.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        last: whether the last token's logits alone are wanted; others may be missing then.
    """
    with ExitStack() as stack:
        yield _BridgeReads(model, stack, last) if hasattr(model, "original_model") else _HookedReads(model)


def read_once(model: LensModel, tokens: Int[Tensor, "prompt pos"]) -> Any:
    """Logits of a forward pass after which nothing is read on: no keys and values are kept, block after block.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        tokens: padded on the right, if at all.
    """
    if model not in _NEEDLESS:
        hf_model = getattr(model, "original_model", None)
        _NEEDLESS[model] = hf_model is not None and _holds_no_state(hf_model)
    # padding_side: a HookedTransformer whose tokenizer pads on the left would take leading BOS tokens for padding.
    options = {"padding_side": "right"} | ({"use_cache": False} if _NEEDLESS[model] else {})
    return model(tokens.to(model.cfg.device), **options)


_NEEDLESS: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


def _holds_no_state(hf_model: Any) -> bool:
    """Whether a cache of keys and values is all that a pass leaves: what has a state computes otherwise without one."""
    takes, text = set(inspect.signature(hf_model.forward).parameters), text_config(getattr(hf_model, "config", None))
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    named = "use_cache" in takes and bool(takes & {"cache", "past_key_values"})
    return named and "cache_params" not in takes and set(kinds) <= set(_ATTENTION)


def has_cache(model: LensModel) -> bool:
    """Whether the model takes a cache that this module knows how to hand over."""
    if hasattr(model, "original_model"):
        return _cache_name(model) is not None
    return "past_kv_cache" in inspect.signature(getattr(model, "forward", model)).parameters


def _reading_again(model: LensModel) -> Step:
    read: list[Tensor] = []

    def step(tokens: Tensor) -> Tensor:
        read.append(tokens)
        return read_once(model, torch.cat(read, 1))[:, -1]

    return step


class _HookedReads:
    """With TransformerLens's own cache."""

    def __init__(self, model: LensModel) -> None:
        self.model, self.held = model, None

    def __call__(self, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "row last d_vocab"]:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        tokens = tokens.to(self.model.cfg.device)
        if self.held is None:
            self.held = TransformerLensKeyValueCache.init_cache(self.model.cfg, self.model.cfg.device, len(tokens))
        # Given no mask, a HookedTransformer takes pad tokens at an end of a prompt for padding; nothing here is padded.
        mask = torch.ones_like(tokens)
        return self.model(tokens, past_kv_cache=self.held, attention_mask=mask, padding_side="right")

    def go_on(self, held: Any, rows: Rows, *, last: bool = False) -> None:
        self.held = held = copy.copy(held)
        if held is None or rows is None:
            return
        held.entries = [copy.copy(entry) for entry in held.entries]
        if last:
            held.freeze()
        for layer, entry in enumerate(held.entries):
            chosen = _rows(rows, layer, self.model)
            entry.past_keys, entry.past_values = entry.past_keys[chosen], entry.past_values[chosen]
        held.previous_attention_mask = held.previous_attention_mask[_rows(rows, 0, self.model)]

    def align(self, lengths: Int[Tensor, " prompt"]) -> None:
        assert self.held is not None
        mask = self.held.previous_attention_mask
        moved = _to_the_end(lengths, mask.shape[1])
        for entry in self.held.entries:
            entry.past_keys, entry.past_values = moved(entry.past_keys, 1), moved(entry.past_values, 1)
        self.held.previous_attention_mask = _padding(lengths, mask.shape[1]).to(mask)


class _BridgeReads:
    """Through the Bridge, so that all its hooks fire, with the cache of the Hugging Face model inside."""

    def __init__(self, model: Any, stack: ExitStack, last: bool) -> None:
        name = _cache_name(model)
        assert name is not None
        self.model, self.name, self.held, self.stepping, self.mask = model, name, None, 0, None
        attentions = _attentions(model)  # all of them, before some give way to what they wrap
        stack.enter_context(unwrapped(model))  # before this function's own hooks

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == self.stepping:  # somebody else's pass, in whatever thread, is none of ours
                self.held = getattr(output, name, None)

        stack.callback(model.original_model.register_forward_hook(keep).remove)
        for attention in attentions:
            stack.callback(attention.register_forward_pre_hook(_under_the_name_that_is_read, with_kwargs=True).remove)
        takes = inspect.signature(model.original_model.forward).parameters
        self.options: dict[str, Any] = {"use_cache": True, "padding_side": "right"}
        self.options |= {"logits_to_keep": 1} if last and "logits_to_keep" in takes else {}

    def __call__(self, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "row last d_vocab"]:
        given: dict[str, Any] = {} if self.held is None else {self.name: self.held}
        if self.mask is not None:  # of it the Bridge makes the positions, for models that take them
            self.mask = given["attention_mask"] = torch.cat([self.mask, self.mask.new_ones(tokens.shape)], 1)
        self.stepping = threading.get_ident()
        try:
            return self.model(tokens.to(self.model.cfg.device), **self.options, **given)
        finally:
            self.stepping = 0

    def go_on(self, held: Any, rows: Rows, *, last: bool = False) -> None:
        self.held = held = copy.copy(held)
        if held is None or rows is None:
            return
        held.layers = [copy.copy(layer) for layer in held.layers]
        for number, layer in enumerate(held.layers):
            chosen = _rows(rows, number, self.model)
            if last and type(layer).__name__ in _PLAIN:
                _keep_nothing_(layer, chosen)
            else:
                layer.batch_select_indices(chosen)

    def align(self, lengths: Int[Tensor, " prompt"]) -> None:
        held: Any = self.held
        width = int(held.get_seq_length())
        moved = _to_the_end(lengths, width)
        for layer in held.layers:
            layer.keys, layer.values = moved(layer.keys, 2), moved(layer.values, 2)
        self.mask = _padding(lengths, width).to(self.model.cfg.device)


_PLAIN = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of a cache that hold keys and values and nothing else."""


def _keep_nothing_(layer: Any, rows: Int[Tensor, " row"]) -> None:
    """Let a layer of transformers' cache choose its rows when the pass comes to it, and keep nothing of what it reads.

    What stands for keys and values afterwards has their shape, and is NaN: a model that reads them again, as one whose
    layers share them does, is found out where ``proof`` compares.
    """
    layer.update = partial(_pass, weakref.ref(layer), rows)  # weak, or a layer would be freed by the collector alone


def _pass(of: weakref.ref[Any], rows: Int[Tensor, " row"], *args: Any, **options: Any) -> Any:
    layer: Any = of()
    layer.batch_select_indices(rows)
    found = type(layer).update(layer, *args, **options)
    kept = layer.keys, layer.values
    layer.keys, layer.values = (x.new_full((1,), torch.nan).expand(x.shape) for x in kept)
    return found


def _rows(rows: Any, layer: int, model: LensModel) -> Int[Tensor, " row"]:
    return torch.tensor(rows(layer) if callable(rows) else rows, dtype=torch.long, device=model.cfg.device)


def _padding(lengths: Int[Tensor, " prompt"], width: int) -> Int[Tensor, "prompt pos"]:
    """Ones where tokens of rows of these lengths are that stand at the end."""
    return (torch.arange(width) >= width - lengths[:, None]).long()


def _to_the_end(lengths: Int[Tensor, " prompt"], width: int) -> Callable[[Tensor, int], Tensor]:
    """A function that turns each row along a dimension until its first so many entries are the last."""
    places = (torch.arange(width) + lengths[:, None]) % width

    def moved(x: Tensor, along: int) -> Tensor:
        if x.shape[0] != len(lengths) or x.shape[along] != width:
            raise ModelError(
                f"a cache of shape {tuple(x.shape)} does not hold what {width} tokens of {len(lengths)} prompts left, "
                "so prompts of several lengths cannot be read on from it; answer prompts of one length at a time"
            )
        shape = [len(lengths), *(width if at == along else 1 for at in range(1, x.ndim))]
        return x.gather(along, places.view(shape).to(x.device).expand_as(x))

    return moved


def _cache_name(model: Any) -> str | None:
    takes = inspect.signature(model.original_model.forward).parameters
    return next((name for name in _NAMES if name in takes), None)


_ATTENTIONS: weakref.WeakKeyDictionary[Any, tuple[nn.Module, ...]] = weakref.WeakKeyDictionary()


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
