"""Which tokens an intervention edits, by their role: prompt, instruction, answer, the prompt's last tokens.

    mask[prompt, pos]  =  position ``start + pos`` of that prompt lies in the scope

``start`` is where the current forward pass begins to read. Under the key-value cache that is not 0 (hooks see the
prompt once and then one token at a time), and prompts of a batch differ in length and may be padded: so the mask is
made anew for each pass from what the verb that runs the model knows about its prompts
(``models.stream.current_batch``). "Generated" means everything after the prompt: what ``generate`` appends, and the
response of a prompt that has one.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_em.arguments import whole
from tl_em.errors import UsageError
from tl_em.models.prompts import Batch
from tl_em.models.stream import current_batch

Words = Literal["all", "prompt", "generated", "instruction"]
Where = Words | tuple[Literal["last"], int]
Mask = Bool[Tensor, "prompt pos"]


def check_where(where: Where | Any) -> Where:
    """``where``, if it is a scope.

    Raises:
        UsageError: anything else.

    Example:
        >>> check_where("prompt"), check_where(("last", 3))
        ('prompt', ('last', 3))
        >>> check_where("answer")
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: there is no scope 'answer'; ...
    """
    if isinstance(where, tuple | list) and len(where) == 2 and where[0] == "last":
        with suppress(UsageError):
            return "last", whole("k", where[1], low=1)
    if not isinstance(where, str) or where not in get_args(Words):
        raise UsageError(
            f"there is no scope {where!r}; use one of {', '.join(map(repr, get_args(Words)))}, or ('last', k) for the "
            "last k tokens of the prompt, k at least 1"
        )
    return where  # pyright: ignore[reportReturnType]


def scope_mask(batch: Batch, where: Where, width: int) -> Mask:
    """The tokens in scope, of the ``width`` tokens that the current pass reads of each prompt.

    Args:
        batch: the prompts, and where the pass begins.
        where: the scope; padding belongs to none but ``"all"``.
        width: tokens that the pass reads of each prompt.

    Example:
        >>> from tl_em.models.prompts import EncodedPrompt, make_batch
        >>> batch = make_batch([EncodedPrompt.from_ids([5, 7]).with_response([9]), EncodedPrompt.from_ids([4])], [0, 1])
        >>> scope_mask(batch, "prompt", 3).int().tolist(), scope_mask(batch, "generated", 3).int().tolist()
        ([[1, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 0, 0]])
        >>> scope_mask(batch._replace(start=1), ("last", 1), 1).int().tolist()
        [[1], [0]]
    """
    first, end = _span(batch, where)
    position = batch.starts[:, None] + torch.arange(width)
    return (position >= first[:, None]) & (position < end[:, None])


def _span(batch: Batch, where: Where) -> tuple[Int[Tensor, " prompt"], Int[Tensor, " prompt"]]:
    """Where the scope begins and ends in each prompt."""
    zero = torch.zeros_like(batch.prompts)
    if where == "all":
        return zero, torch.full_like(zero, torch.iinfo(zero.dtype).max)
    if where == "instruction":
        return batch.instructions[:, 0], batch.instructions[:, 1]
    if where == "generated":
        return batch.prompts, batch.lengths
    return zero if where == "prompt" else batch.prompts - where[1], batch.prompts


def running_batch(what: str) -> Batch:
    """The batch that a verb of tl_em runs now.

    Raises:
        UsageError: the model is run by somebody else, so nobody knows which token is prompt and which is answer.
    """
    batch = current_batch.get()
    if batch is None:
        raise UsageError(
            f"{what} needs to know which tokens are prompt and which are answer, and a forward pass that you run "
            "yourself does not say. Inside this block run the model with em.generate, em.capture or a metric (they "
            "know), or use where='all'"
        )
    return batch


class Scope:
    """The mask of the pass that runs now, made once per pass however many hook points ask for it."""

    def __init__(self, where: Where | Any) -> None:
        self.where: Where = check_where(where)
        self._batch: Batch | None = None
        self._masks: dict[tuple[int, int], Mask] = {}

    def alike(self, batch: Batch, length: int) -> list[tuple[bool, ...]]:
        """For each row which of its first tokens are in scope: ``models.hooks.Alike``."""
        return [tuple(row) for row in scope_mask(batch, self.where, length).tolist()]

    def mask(self, x: Tensor) -> Mask | None:
        """For activations [prompt pos d_model], on the CPU; None where everything is in scope."""
        if self.where == "all":
            return None
        batch = running_batch(f"where={self.where!r}")
        if batch is not self._batch:
            self._batch, self._masks = batch, {}
        shape = (x.shape[0], x.shape[1])
        if shape not in self._masks:
            # A pass that is fanned out reads one row for a batch of copies of one prompt, up to where they part.
            self._masks[shape] = scope_mask(batch, self.where, x.shape[1])[: x.shape[0]]
        return self._masks[shape]
