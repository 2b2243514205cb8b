"""What a graph may be asked about: one prompt, tokens of it, numbers of them; checked where it enters.

A batch that is flattened is a prompt that nobody wrote, and an id that the vocabulary has not is somebody else's
IndexError. Ids may come as a list, an array or a tensor, also as the single row that a tokenizer gives; whole numbers
of any library are numbers, and what is none is named.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tl_em.arguments import whole
from tl_em.errors import ModelError, PositionError, PromptError, UnknownTokenError, UsageError
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt

_FEW = 5
"""Of what is wrong in a list, so many are named."""


def is_ids(value: Any) -> bool:
    """Whether a prompt is given as tokens: an array or a tensor, a list of numbers, or what a tokenizer returns."""
    if isinstance(value, Mapping):
        return "input_ids" in value
    if hasattr(value, "tolist"):
        return True
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return False
    if value and all(isinstance(each, list | tuple) for each in value):  # rows of numbers, or several chats
        return not any(isinstance(each, str | Mapping) for row in value for each in row)
    return not all(isinstance(each, str | Mapping | EncodedPrompt) for each in value) or not len(value)


def is_chat(value: Any) -> bool:
    """Whether a prompt is the messages of one chat."""
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return listed and len(value) > 0 and all(isinstance(each, Mapping) for each in value)


def ids_of(value: Any, d_vocab: int) -> list[int]:
    """One prompt's tokens.

    Raises:
        PromptError: several prompts, none, or something that is no whole number. UnknownTokenError: ids that the
            vocabulary has not.
    """
    if isinstance(value, Mapping):
        value = _unmasked(value)
    listed = value.tolist() if hasattr(value, "tolist") else list(value)
    if not isinstance(listed, list):
        raise PromptError(f"The prompt is the single number {listed!r}, not a list of tokens. Give [{listed!r}].")
    if listed and all(_is_row(each) for each in listed):
        if len(listed) > 1:
            raise PromptError(
                f"The prompt is a batch of {len(listed)} rows where one prompt is meant; run together they would be a "
                "text that nobody wrote. Give one row, tokens[0], or all: em.graph.attribute_over(model, tokens, …)."
            )
        listed = list(listed[0].tolist() if hasattr(listed[0], "tolist") else listed[0])
    if not listed:
        raise PromptError("The prompt has no tokens, so there is nothing to attribute to. Give at least one.")
    ids = [_index(each) for each in listed]
    if wrong := [f"{listed[at]!r} at {at}" for at, found in enumerate(ids) if found is None]:
        raise PromptError(f"Tokens are whole numbers, and the prompt has {_few(wrong)}. Give token ids, or text.")
    found = [each for each in ids if each is not None]
    check_known(found, d_vocab)
    return found


def check_known(ids: Sequence[int], d_vocab: int) -> None:
    """Raise unless the vocabulary has every id."""
    if wrong := [f"{each} at {at}" for at, each in enumerate(ids) if not 0 <= each < d_vocab]:
        raise UnknownTokenError(
            f"The prompt has tokens that the model has not: {_few(wrong)}, of a vocabulary of {d_vocab}. Encode it "
            "with the model's own tokenizer: em.attribute(model, text, …)."
        )


def token_list(target: Any, d_vocab: int) -> list[str | int]:
    """A target's tokens, as words or ids: one of them, or a list, an array or a tensor of one axis.

    Raises:
        UsageError: something else, none at all, or an id that the vocabulary has not.
    """
    if hasattr(target, "tolist"):
        target = target.tolist()
    if isinstance(target, str) or not isinstance(target, Sequence | set | frozenset | range):
        target = [target]
    found = [each if isinstance(each, str) else _index(each) for each in target]
    if not found or any(each is None for each in found):
        raise UsageError(
            f"target={_shown(target)} is no target; give a token or a list of them, (yes, no), a Direction or a "
            "Completion (a vector is no target: em.Direction(vector, em.Site(layer)) is)"
        )
    tokens = [each for each in found if each is not None]
    for each in tokens:
        if not isinstance(each, str) and not 0 <= each < d_vocab:
            raise UsageError(f"token {each} is not among the model's {d_vocab}; give a word or its id")
    return tokens


def positions(skip: Any, length: int) -> tuple[int, ...]:
    """Places in the prompt, counted from the front, or with a minus from its end.

    Raises:
        UsageError: no list of whole numbers. PositionError: a place that the prompt has not.
    """
    listed = skip.tolist() if hasattr(skip, "tolist") else skip
    if isinstance(listed, str | bytes | Mapping) or not isinstance(listed, Iterable):
        raise UsageError(f"skip={_shown(skip)} is no list, so it names no positions. Give a list, e.g. skip=[0].")
    found = [whole("a position in skip", each) for each in listed]
    if wrong := [each for each in found if not -length <= each < length]:
        raise PositionError(
            f"skip names the positions {_few(list(map(str, wrong)))}, and the prompt has {length} tokens, 0 to "
            f"{length - 1}. Give positions that it has."
        )
    return tuple(dict.fromkeys(range(length)[each] for each in found))


def check_model(model: LensModel) -> None:
    """Raise where a model's weights allow no gradients, or hold no numbers.

    Raises:
        ModelError, UsageError.
    """
    for name, each in model.named_parameters():  # pyright: ignore[reportAttributeAccessIssue]
        if each.is_meta:
            raise ModelError(
                f"{name} is on the meta device, where a tensor has a shape and no numbers, so there is nothing to "
                "attribute. Load the model on a real device: em.load_model(source, device='cpu')."
            )
        if each.is_inference():
            raise ModelError(
                f"{name} was made inside torch.inference_mode(), so nothing can be differentiated through it. Load the "
                "model outside of that block."
            )
        if each.is_floating_point() and each.dtype not in (torch.float32, torch.float64):
            raise UsageError(
                f"the model is in {each.dtype}, in which attributions do not reproduce (some 30 % off); load it once "
                "more for this: em.load_model(source, dtype=torch.float32)"
            )


def _unmasked(encoded: Mapping[str, Any]) -> Any:
    """The ids of what a tokenizer returned, where it hides none of them."""
    mask: Any = encoded.get("attention_mask")
    rows = mask.tolist() if hasattr(mask, "tolist") else mask
    flat = [each for row in rows or () for each in (row if isinstance(row, list) else [row])]
    if not all(flat):
        raise PromptError(
            "The prompt's attention_mask hides some of its tokens (padding), which a graph would show as read. Encode "
            "the one prompt without padding, or give its text."
        )
    return encoded["input_ids"]


def _is_row(each: Any) -> bool:
    return isinstance(each, list | tuple) or getattr(each, "ndim", 0) > 0


def _index(value: Any) -> int | None:
    """A whole number of any library; None for anything else."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) or getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        return None


def _few(wrong: Sequence[str]) -> str:
    return ", ".join(wrong[:_FEW]) + (f" and {len(wrong) - _FEW} more" if len(wrong) > _FEW else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
