"""The prompts of a batch, read before they are answered: of several lengths side by side, and what is equal once.

    what they begin with alike   ->   keys and values, copied to each of them (``beginnings``)
    prompts [row pos], padded on the right, equal ones as one row   ->   the logits after each one's last token
    keys and values, a copy for each answer, turned to the end      ->   one token of every answer a pass

A token attends to nothing behind it, so the first pass needs no mask.  What it leaves of a shorter prompt is then moved
to where it would stand had that prompt been padded on the left: distances between tokens are the true ones, what stands
before them is masked, and their positions follow from the mask.  That this equals reading each text alone is part of
``proof``, for texts up to the first window or rotary boundary of the model; one with a recurrent state, which padding
would enter, fails it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.models.beginnings import Piece, beginning_of
from tl_em.models.cache import Step, reading_on, steps
from tl_em.models.hooks import LensModel, labelling
from tl_em.models.prompts import Batch
from tl_em.models.source_record import boundaries_of
from tl_em.models.stream import Unembedding, generating

_SHOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def allow_side_by_side(model: Any, shown: bool) -> None:
    """Remember whether a model was shown to give the same where prompts are read side by side."""
    _SHOWN[model] = shown


def may_read_side_by_side(model: LensModel, length: int) -> bool:
    """Whether prompts of several lengths, read side by side, were shown to be answered as alone up to ``length``."""
    return _SHOWN.get(model, False) and all(length <= at for at in boundaries_of(model).all)


class Prefill(NamedTuple):
    """How the prompts of a batch are read.

    Args:
        batch: a row an answer.
        first: what the first pass reads: each prompt once.
        group: the row of ``first`` that each row of ``batch`` goes on from.
        rest: ``first`` after what its rows begin with alike, where that is read beforehand.
    """

    batch: Batch
    first: Batch
    group: Int[Tensor, " prompt"]
    rest: Piece | None = None

    @property
    def reads(self) -> list[Batch]:
        """What each pass reads, up to the last tokens of all prompts."""
        found = [] if self.rest is None or self.rest.after is None else [self.rest.after.batch]
        return [*found, self.first if self.rest is None else self.rest.batch]

    @classmethod
    def of(cls, batch: Batch, labels: list[Any]) -> Prefill:
        """Rows of one label are read once."""
        firsts = {label: row for row, label in reversed(list(enumerate(labels)))}
        order = {label: k for k, label in enumerate(firsts)}
        first = batch if len(firsts) == len(labels) else batch.only(list(firsts.values()))
        return cls(batch, first, torch.tensor([order[label] for label in labels]))


def prefill_of(model: LensModel, batch: Batch, length: int) -> Prefill | None:
    """How to read the prompts of a batch at once; None where all that there is to it is to read them one after another.

    Args:
        model: with all hooks on it, and a cache that was shown right up to ``length``.
        batch: whole prompts.
        length: tokens of the longest prompt and its answer.
    """
    one_length = bool((batch.lengths == batch.tokens.shape[1]).all())
    if not (_SHOWN.get(model, False) if one_length else may_read_side_by_side(model, length)):
        return None
    parts = (batch.tokens, batch.lengths[:, None], batch.prompts[:, None], batch.instructions)
    asked = [tuple(row) for row in torch.cat(parts, 1).tolist()]
    labels: list[Any] = list(range(len(asked)))
    if len(set(asked)) < len(asked) and (alike := labelling(model)) is not None:
        known = alike(batch, batch.tokens.shape[1])
        labels = labels if known is None else list(zip(asked, known, strict=True))
    found = Prefill.of(batch, labels)
    found = found._replace(rest=beginning_of(model, found.first, int(batch.lengths.min()) - 1))
    return None if one_length and found.first is batch and found.rest is None else found


@contextmanager
def answering(
    model: LensModel, batch: Batch, length: int, *, cached: bool
) -> Iterator[tuple[Step, Int[Tensor, " prompt"] | None]]:
    """A function that reads tokens of every row of a batch, and how long the prompts are that it is first given.

    Args:
        model: with all hooks on it.
        batch: whole prompts, a row an answer.
        length: tokens of the longest prompt and its answer.
        cached: whether a call reads its own tokens alone, as of ``steps``.

    Yields:
        The function; and the lengths, None where all prompts are read at once, in its first call.
    """
    prefill = prefill_of(model, batch, length) if cached else None
    stepping = steps(model, cached=cached) if prefill is None else steps_after(model, prefill)
    with generating(model, batch, [] if prefill is None else prefill.reads), stepping as step:
        yield step, batch.lengths if prefill is None else None


@contextmanager
def steps_after(model: LensModel, prefill: Prefill) -> Iterator[Step]:
    """A function that reads the prompts when it is first called, and then tokens of every answer, as ``steps`` does."""
    batch, first, group, rest = prefill
    padded = bool((batch.lengths < batch.tokens.shape[1]).any())
    rows, start = torch.arange(len(first.rows)), 0 if rest is None else rest.batch.start
    columns = first.lengths - 1 - start
    with ExitStack() as stack:
        unembedding = Unembedding(model, stack) if padded else None
        read = stack.enter_context(reading_on(model, last=not padded))

        def prompts() -> Float[Tensor, "prompt d_vocab"]:
            if unembedding is not None:
                unembedding.want(lambda x: x[rows.to(x.device), columns.to(x.device)], start)
            if rest is not None and rest.after is not None:
                read(rest.after.batch.tokens)
                read.go_on(read.held, rest.of)
            logits = read(first.tokens[:, start:])
            if first is not batch:
                read.go_on(read.held, group.tolist())
            if unembedding is None:
                return logits[:, -1]
            narrowed = unembedding.narrowed
            unembedding.want(None)
            read.align(batch.lengths)
            return logits[0] if narrowed else logits[rows, columns]

        waiting = [prompts]

        def step(tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt d_vocab"]:
            if not waiting:
                return read(tokens)[:, -1]
            logits = waiting.pop()()
            return logits[group.to(logits.device)] if first is not batch else logits

        yield step
