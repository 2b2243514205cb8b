"""What a model's source says that a surface of TransformerLens has no place for: end tokens, and where behaviour turns.

A HookedTransformer keeps neither ``generation_config`` nor the Hugging Face config, so a model that ``load_model``
made carries what they say, and so do its copies. A Bridge holds the Hugging Face model, and is read directly.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tl_em.errors import UnprovenWarning


@dataclass(frozen=True)
class Boundaries:
    """Lengths, in tokens, at which a model begins to compute something else.

    Args:
        windows: widths of sliding windows and chunks of attention: beyond one, a token no longer sees the first.
        turns: lengths at which the rotary frequencies of *all* tokens change (longrope): prompts on different sides
            of one cannot share a padded batch, nor a cache be carried across it.
        scaled: lengths that the rotary scaling stretches (llama3, yarn); nothing changes there if it is read rightly.
    """

    windows: tuple[int, ...] = ()
    turns: tuple[int, ...] = ()
    scaled: tuple[int, ...] = ()

    @property
    def all(self) -> tuple[int, ...]:
        """Every boundary, shortest first."""
        return tuple(sorted({*self.windows, *self.turns, *self.scaled}))


@dataclass(frozen=True)
class Source:
    """What is remembered of where a model came from."""

    ends: tuple[int, ...]
    boundaries: Boundaries
    proven: bool
    beyond: tuple[int, ...]
    origin: HfSource | None = None


class HfSource(NamedTuple):
    """What else a Hugging Face directory holds beside the weights.

    Args:
        kind: class of the Hugging Face model.
        config: as it was before a surface was built.
        generation_config: likewise; None without one.
        tokenizer: before TransformerLens named special tokens in it; None without one.
    """

    kind: type
    config: Any
    generation_config: Any
    tokenizer: Any

    @classmethod
    def of(cls, hf_model: Any, tokenizer: Any) -> HfSource:
        """Copies, but for the tokenizer."""
        generation = getattr(hf_model, "generation_config", None)
        return cls(type(hf_model), copy.deepcopy(hf_model.config), copy.deepcopy(generation), tokenizer)


_KEPT = "tl_em_source"


def _source(model: Any) -> Source | None:
    return getattr(model, "__dict__", {}).get(_KEPT)


def remember(
    model: Any, hf_model: Any, *, proven: bool, beyond: Sequence[int] = (), origin: HfSource | None = None
) -> None:
    """Keep what ``hf_model`` says for ``model``, which was built from it, and whether the two were compared.

    ``beyond`` are the boundaries that lie past the longest prompt on which they were; ``origin`` is what was there
    before the surface was built.
    """
    ends = tuple(_ends(hf_model))
    model.__dict__[_KEPT] = Source(ends, boundaries(hf_model.config), proven, tuple(beyond), origin)


def hf_source_of(model: Any) -> HfSource | None:
    """What ``load_model`` kept of a model's source; None of a model that came ready-made."""
    known = _source(model)
    return None if known is None else known.origin


_WARNED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def warn_beyond_proof(model: Any, length: int) -> None:
    """Warn, once a model, of a text longer than a boundary that was too costly to cross when the model was proven."""
    known = _source(model)
    crossed = [] if known is None else [at for at in known.beyond if at < length]
    if crossed and model not in _WARNED:
        _WARNED[model] = True
        warnings.warn(
            f"A text of {length} tokens is longer than the sliding window or rotary boundary of {crossed[0]} that the "
            f"model's config names, and proving this model beyond it was too costly on this machine when it was "
            f"loaded, so what is measured on such a text is not shown to be right. Use texts of at most {crossed[0]} "
            f"tokens, or load the model on a GPU.",
            UnprovenWarning,
            stacklevel=4,
        )


def was_proven(model: Any) -> bool | None:
    """Whether ``load_model`` compared the model with its source; None of a model that came ready-made."""
    known = _source(model)
    return None if known is None else known.proven


def end_tokens(model: Any) -> list[int]:
    """The end-of-text tokens that the model can produce (a loader may have invented one that it cannot)."""
    known = _source(model)
    configured = known.ends if known is not None else _ends(getattr(model, "original_model", None))
    own = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    found = {*configured, *([] if own is None else [int(own)])}
    return sorted(token for token in found if 0 <= token < int(model.cfg.d_vocab))


def _ends(hf_model: Any) -> Iterator[int]:
    """As transformers reads them: the generation config decides, the config only where that names none."""
    for holder in (getattr(hf_model, "generation_config", None), getattr(hf_model, "config", None)):
        found = getattr(holder, "eos_token_id", None)
        if found is not None:
            listed = found.tolist() if hasattr(found, "tolist") else found  # transformers takes a tensor as well
            yield from (int(token) for token in (listed if isinstance(listed, list | tuple | set) else [listed]))
            return


def boundaries_of(model: Any) -> Boundaries:
    """Of a model with hook points; none where its config is not known."""
    known, config = _source(model), getattr(getattr(model, "original_model", None), "config", None)
    if known is not None:
        return known.boundaries
    return Boundaries() if config is None else boundaries(config)


_WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention")


def boundaries(config: Any) -> Boundaries:
    """Every window and rotary boundary that a Hugging Face config names.

    Example:
        >>> class Config:
        ...     sliding_window, max_position_embeddings = 512, 4096
        ...     rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 1024}
        >>> boundaries(Config())
        Boundaries(windows=(512,), turns=(1024,), scaled=())
    """
    text = text_config(config)
    windows = {width for name in _WINDOWS for width in _lengths(getattr(text, name, None))}
    turns, scaled = set(), set()
    for rope in _ropes(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)):
        kind = rope.get("rope_type", rope.get("type"))
        at = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        if kind == "dynamic":
            at = getattr(text, "max_position_embeddings", None)
        if kind not in (None, "default"):
            (turns if kind in ("longrope", "dynamic") else scaled).update(_lengths(at))
    return Boundaries(*(tuple(sorted(each)) for each in (windows, turns, scaled)))


def text_config(config: Any) -> Any:
    """The part of a Hugging Face config that is about text."""
    return getattr(config, "text_config", None) or config


def _lengths(value: Any) -> Iterable[int]:
    return [int(value)] if isinstance(value, int) and not isinstance(value, bool) and value > 0 else []


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """One set of parameters, or one a kind of layer."""
    if isinstance(parameters, dict):
        nested = [each for each in parameters.values() if isinstance(each, dict)]
        yield from nested or [parameters]
