"""What prompts of a batch begin with alike, a system prompt say, read once.

    beginning [group pos]  ->  keys and values, copied to the rows of each group  ->  the rest [prompt pos] after them

A token attends to nothing behind it, so what the first tokens give does not depend on what follows.  Rows are of one
group where every hook on the model does to their first tokens the same: it says so itself (``alike``, see
``models.hooks.Alike``), and a hook that does not say so, anybody else's included, has every row read whole.  That both
ways give the same is part of ``proof``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.models.cache import reading_on
from tl_em.models.hooks import LensModel, groups_of
from tl_em.models.prompts import Batch
from tl_em.models.source_record import boundaries_of

LEAST, SAVED = 8, 0.15
"""Tokens that a beginning has at least, and the least part of a batch's tokens for which a second pass is worth it."""
_SHOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def allow_beginnings(model: Any, shown: bool) -> None:
    """Remember whether a model was shown to give the same where the beginning of a batch is read once."""
    _SHOWN[model] = shown


@dataclass(frozen=True, eq=False)
class Beginning:
    """The first tokens of a batch, a row a group.

    Args:
        batch: the beginnings, as a batch of its own.
        group: the group of each row of the whole batch.
        rest: the whole batch, in a pass that starts after the beginning.
    """

    batch: Batch
    group: Int[Tensor, " prompt"]
    rest: Batch

    @property
    def length(self) -> int:
        """Tokens."""
        return self.rest.start


def beginning_of(model: LensModel, batch: Batch, first: int) -> Beginning | None:
    """What the prompts of a batch begin with alike; None where it is not worth a pass, or was not shown to be right.

    Args:
        model: with all hooks on it.
        batch: whole prompts.
        first: the first token of which something is wanted.
    """
    if not _SHOWN.get(model, False) or len(batch.rows) < 2:
        return None
    width = batch.tokens.shape[1]
    same = (batch.tokens == batch.tokens[:1]).all(0).cumprod(0)
    length = min(int(same.sum()), first, int(batch.lengths.min()) - 1)
    if length < LEAST or length < SAVED * width or any(at < width for at in boundaries_of(model).turns):
        return None
    labels = groups_of(model, batch, length)
    if labels is None:
        return None
    firsts = {label: row for row, label in reversed(list(enumerate(labels)))}
    if (len(labels) - len(firsts)) * length < SAVED * len(labels) * width:
        return None
    order = {label: k for k, label in enumerate(firsts)}
    return Beginning(
        batch=_cut(batch, list(firsts.values()), length),
        group=torch.tensor([order[label] for label in labels]),
        rest=batch._replace(start=length),
    )


def _cut(batch: Batch, rows: list[int], length: int) -> Batch:
    parts = {name: getattr(batch, name)[rows] for name in ("lengths", "prompts", "instructions")}
    return batch._replace(tokens=batch.tokens[rows, :length], rows=tuple(batch.rows[row] for row in rows), **parts)


def read_after(model: LensModel, begun: Beginning, running: Any) -> Float[Tensor, "row last d_vocab"]:
    """Read the beginnings, then the rest of every row; logits of the rest.

    Args:
        model: as for :func:`beginning_of`.
        begun: what that found.
        running: set to the batch that each pass reads (``models.stream.current_batch``).
    """
    with reading_on(model) as read:
        running.set(begun.batch)
        read(begun.batch.tokens)
        read.select(begun.group)
        running.set(begun.rest)
        return read(begun.rest.tokens[:, begun.length :])
