"""What prompts begin with alike, a system prompt or a question with several answers, read once.

    root [group pos]  ->  beginnings [group pos], e.g. whole questions  ->  the rest [prompt pos]

A token attends to nothing behind it, so what the first tokens give does not depend on what follows: keys and values of
a pass are copied to the rows that go on from it.  Rows are of one group where their tokens are the same and every hook
on the model does to them the same: it says so itself (``alike``, see ``models.hooks.Alike``), and a hook that does not
say so, anybody else's included, has every row read whole.  That both ways give the same is part of ``proof``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor

from tl_em.models.cache import ReadsOn
from tl_em.models.hooks import LensModel, labelling
from tl_em.models.prompts import Batch, EncodedPrompt, batches, make_batch
from tl_em.models.source_record import boundaries_of
from tl_em.models.unwrapped import keeps_cache

LEAST, SAVED = 8, 0.15
"""Tokens that a beginning has at least, and the least part of a batch's tokens for which a second pass is worth it."""
_SHOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def allow_beginnings(model: Any, shown: bool) -> None:
    """Remember whether a model was shown to give the same where beginnings are read once."""
    _SHOWN[model] = shown


@dataclass(frozen=True, eq=False)
class Piece:
    """Some tokens of some rows, read in one pass.

    Args:
        batch: the rows with all their tokens up to the piece's end; ``start`` is where the piece begins.
        after: the piece before, None where this one begins with the first token.
        of: for each row the row of ``after`` that it goes on from.
    """

    batch: Batch
    after: Piece | None = None
    of: tuple[int, ...] = ()


Carried = Callable[[Piece, int], Sequence[int]]
"""Of a piece and a layer: for each row that runs there the row of the piece before, at that layer, that it goes on
from.  For passes in which rows join midway."""


# --- One batch --------------------------------------------------------------------------------------------------------


def beginning_of(model: LensModel, batch: Batch, first: int) -> Piece | None:
    """The rest of a batch, after what its prompts begin with alike; None where that is not worth a pass of its own.

    Args:
        model: with all hooks on it.
        batch: whole prompts.
        first: the first token of which something is wanted.
    """
    length, width = _common(batch, first), batch.tokens.shape[1]
    labels = _labels(model) if len(batch.rows) > 1 and length >= max(LEAST, SAVED * width) else None
    if labels is None or any(at < width for at in boundaries_of(model).turns):
        return None
    found = _grouped(labels, batch, length)
    if found is None or (len(batch.rows) - len(found[0])) * length < SAVED * len(batch.rows) * width:
        return None
    rows, of = found
    return Piece(batch._replace(start=length), Piece(_cut(batch, rows, length)), of)


def _common(batch: Batch, first: int) -> int:
    """How many tokens all rows begin with alike, before any of which something is wanted."""
    same = (batch.tokens == batch.tokens[:1]).all(0).cumprod(0)
    return min(int(same.sum()), first, int(batch.lengths.min()) - 1)


Labels = Callable[[Batch, int], Sequence[Hashable] | None]


def _labels(model: LensModel) -> Labels | None:
    """What says which rows the hooks on a model treat alike; None where beginnings may not be read once."""
    return labelling(model) if _SHOWN.get(model, False) and keeps_cache(model) else None


def _grouped(labels: Labels, batch: Batch, length: int) -> tuple[list[int], tuple[int, ...]] | None:
    """A row of each group of those that are the same up to a length, and the group of every row."""
    known = labels(batch, length)
    if known is None:
        return None
    keys = list(zip(known, _heads(batch, length), strict=True))
    firsts = {key: row for row, key in reversed(list(enumerate(keys)))}
    rows = sorted(firsts.values())
    at = {keys[row]: k for k, row in enumerate(rows)}
    return rows, tuple(at[key] for key in keys)


def _heads(batch: Batch, length: int) -> list[bytes]:
    return [row.tobytes() for row in batch.tokens[:, :length].contiguous().numpy()]


def _cut(batch: Batch, rows: Sequence[int], length: int, start: int = 0) -> Batch:
    """Some rows of a batch up to a length; padding beyond the longest of them is left out."""
    some = batch.only(rows)
    return some._replace(tokens=some.tokens[:, : min(length, int(some.lengths.max()))], start=start)


# --- Many prompts -----------------------------------------------------------------------------------------------------


def pieces(
    model: LensModel,
    encoded: Sequence[EncodedPrompt],
    firsts: Sequence[int],
    *,
    max_tokens: int,
    a_pass: float | None = None,
) -> Iterator[Piece]:
    """The last pieces of all prompts, every prompt in one of them; what they share is read before, once.

    Args:
        model: with all hooks on it.
        encoded: the prompts.
        firsts: of each prompt the first token of which something is wanted.
        max_tokens: rows times tokens of a last piece, what was read before included.
        a_pass: what a pass costs beside its tokens, in tokens; by the model's size where it is not given.
    """
    turns, left = boundaries_of(model).turns, list(range(len(encoded)))
    near = [i for i in left if not any(at < len(encoded[i]) for at in turns)]
    if len({encoded[i].ids[: firsts[i]] for i in near}) < len(near) and (labels := _labels(model)) is not None:
        cost = _a_pass(model) if a_pass is None else a_pass
        plan = _Classes(make_batch(encoded, near), [firsts[i] for i in near], labels, max_tokens, cost)
        yield from plan.pieces()
        left = sorted({*left}.difference(near) | {near[row] for row in plan.left})
    for batch in batches(encoded, max_tokens=max_tokens, turns=turns, rows=left):
        yield beginning_of(model, batch, min(firsts[i] for i in batch.rows)) or Piece(batch)


def _a_pass(model: LensModel) -> float:
    """What a pass costs in tokens: a block's modules, and its weights' way out of memory, beside what a token takes."""
    return 24 + 2**25 / (12 * int(model.cfg.d_model) ** 2)


class _Classes:
    """Rows in classes: a class is read after beginnings that end where something of its first row is wanted.

    Classes are cut where passes and tokens together cost least.  What shares nothing but the root is ``left`` over, to
    be read in batches of like lengths.
    """

    def __init__(self, batch: Batch, firsts: Sequence[int], labels: Labels, max_tokens: int, a_pass: float) -> None:
        self.batch, self.labels, self.max_tokens, self.a_pass = batch, labels, max_tokens, a_pass
        ends = [min(first, length - 1) for first, length in zip(firsts, batch.lengths.tolist(), strict=True)]
        self.ends = sorted(set(ends))
        self.rows = {end: [row for row, each in enumerate(ends) if each == end] for end in self.ends}
        self.left: list[int] = []

    def pieces(self) -> Iterator[Piece]:
        """The last pieces of all classes that share something."""
        root = _common(self.batch, self.ends[0])
        start = root if root >= LEAST else 0
        found = _grouped(self.labels, self.batch, start) if start else ([0], (0,) * len(self.batch.rows))
        if found is None or len(found[0]) * start > self.max_tokens:
            start, found = 0, ([0], (0,) * len(self.batch.rows))
        classes = self._classes(start)
        self.left = [row for each, end in classes if not end for row in each]
        shared = Piece(_cut(self.batch, found[0], start)) if start else None
        for each, end in classes:
            for rows in self._cut_up(each) if end else ():
                chosen = _cut(self.batch, rows, self.batch.tokens.shape[1])
                grouped = _grouped(self.labels, chosen, end)
                assert grouped is not None
                before = [rows[k] for k in grouped[0]]
                of = tuple(found[1][row] for row in before) if shared is not None else ()
                middle = Piece(_cut(self.batch, before, end, start), shared, of)
                yield Piece(chosen._replace(start=end), middle, grouped[1])

    def _cut_up(self, rows: Sequence[int]) -> Iterator[Sequence[int]]:
        """A class in parts of ``max_tokens``, rows of one beginning side by side."""
        most = max(1, self.max_tokens // int(self.batch.lengths[list(rows)].max()))
        for at in range(0, len(rows), most):
            yield rows[at : at + most]

    def _classes(self, start: int) -> list[tuple[list[int], int]]:
        """Rows and the end of their beginnings, 0 where they have none, of the classes that cost least together."""
        n, lengths = len(self.ends), self.batch.lengths.tolist()
        least: list[float] = [0.0] * (n + 1)
        chosen: list[tuple[int, int]] = [(0, 0)] * n
        for i in reversed(range(n)):
            end, rows, heads, width, alone = self.ends[i], list[int](), set[Any](), 0, 0.0
            keys = self._keys(end) if end > start else None
            least[i] = math.inf
            for j in range(i, n):
                new = self.rows[self.ends[j]]
                rows += new
                width = max([width, *(lengths[row] for row in new)])
                passes = math.ceil(len(rows) * width / self.max_tokens)
                alone += sum(lengths[row] - start for row in new)
                cost, cut = alone + passes * self.a_pass, 0
                if keys is not None:
                    heads.update(keys[row] for row in new)
                    shared = len(heads) * (end - start) + len(rows) * (width - end) + 2 * passes * self.a_pass
                    cost, cut = min((cost, 0), (shared, end))
                if cost + least[j + 1] < least[i]:
                    least[i], chosen[i] = cost + least[j + 1], (j + 1, cut)
        found, at = [], 0
        while at < n:
            to, end = chosen[at]
            rows = [row for each in self.ends[at:to] for row in self.rows[each]]
            found.append((self._side_by_side(rows, end), end))
            at = to
        return found

    def _side_by_side(self, rows: list[int], end: int) -> list[int]:
        """Rows of one beginning next to each other."""
        keys = self._keys(end) if end else None
        if keys is None:
            return rows
        order = {key: row for row, key in reversed(list(enumerate(keys)))}
        return sorted(rows, key=lambda row: (order[keys[row]], row))

    def _keys(self, end: int) -> list[tuple[Hashable, bytes]] | None:
        """What tells rows apart up to a token; None where it is unknown."""
        known = self.labels(self.batch, end)
        return None if known is None else list(zip(known, _heads(self.batch, end), strict=True))


# --- The passes -------------------------------------------------------------------------------------------------------


class PieceReader:
    """Reads pieces, each after what it goes on from; a root that several go on from is read once.

    Args:
        read: reads on.
        running: set to the batch that each pass reads (``models.stream.current_batch``).
        carried: which rows go on from which, where rows join a pass midway; what the pieces say by default.
    """

    def __init__(self, read: ReadsOn, running: Any, carried: Carried | None = None) -> None:
        self.read, self.running, self.carried = read, running, carried
        self.root: tuple[Piece, Any] | None = None

    def __call__(self, piece: Piece) -> Float[Tensor, "row last d_vocab"]:
        """Logits of a piece's tokens; nothing goes on from it."""
        return self._read(piece, last=True)

    def _read(self, piece: Piece, *, last: bool = False) -> Float[Tensor, "row last d_vocab"]:
        before = piece.after
        if before is None:
            self.read.go_on(None, None)
        elif before.after is None:
            if self.root is None or self.root[0] is not before:
                self._read(before)
                self.root = before, self.read.held
            self.read.go_on(self.root[1], self._rows(piece), last=last)
        else:
            self._read(before)
            self.read.go_on(self.read.held, self._rows(piece), last=last)
        self.running.set(piece.batch)
        tokens = piece.batch.tokens[:, piece.batch.start :]
        return self.read(tokens if self.carried is None else tokens[:1])

    def _rows(self, piece: Piece) -> Any:
        if self.carried is None:
            return piece.of
        return partial(self.carried, piece)
