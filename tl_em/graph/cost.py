"""What a graph will take, said before the work, and how much of it is drawn where it would take too much.

    work = nodes that read * passes * tokens * 12 layers d_model^2         (one step through the blocks for each row)

Up to ``WHOLE`` a graph is drawn whole: by its sizes alone, so that the same graph is the same everywhere. Beyond, or
where one of the limits asks for it, only the nodes that lead are drawn (``leaders``).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from tl_em.errors import GraphTooLargeError
from tl_em.graph.gradients import Linearised, Reader, gradients
from tl_em.graph.nodes import MAX_BYTES
from tl_em.models.hooks import LensModel

CHUNK = 256
LONG = 20.0
"""Seconds above which the cost is told before the work."""
WHOLE = 10**12
"""Work up to which a graph is drawn whole: some seconds on one core."""
MAX_NODES = 8000
"""Nodes that a graph which is drawn whole may have."""
LEADERS, SHARE = 300, 0.9
"""Of a graph that is not drawn whole, so many nodes at most, until they hold so much of all nodes' effect."""
LED_CHUNK, LED_BYTES = 64, 2**28
"""Of memory for a chunk of gradients there, where less than ``max_bytes``: larger chunks are no faster."""
TRIAL = 8
"""Readers in a chunk that is timed."""
COPIES = 130
"""A graph's validation, in passes of one prompt: some 210 copies, in batches."""
LESS = "pass a smaller max_nodes= (the rest goes into error nodes), or max_bytes="
SHORTER = "pass a smaller max_nodes=, a shorter prompt (every head and MLP is a node at every token), or max_bytes="
"""What to do about a graph that is too large: one with dictionaries, and one of components."""


class Limits(NamedTuple):
    """How much of a graph is drawn, and what it may take.

    Args:
        max_nodes: that are drawn; None: as many as its size allows.
        share: of all nodes' effect that those drawn hold; None: all of it in a small graph, else ``SHARE``.
        max_seconds: for all of the work; None: no limit.
        max_bytes: of memory for gradients and edges.
        chunk: readers at once.
        validate: whether nodes are ablated afterwards, which takes time too.
        also: ids of nodes that are drawn beside those that lead.
        edges: whether any are wanted; without, nodes are scored and nothing is timed.
    """

    max_nodes: int | None = None
    share: float | None = None
    max_seconds: float | None = None
    max_bytes: int = MAX_BYTES
    chunk: int = CHUNK
    validate: bool = True
    also: frozenset[str] = frozenset()
    edges: bool = True

    @property
    def asked(self) -> tuple[int, float]:
        """Of a graph that is not drawn whole: nodes at most, and the share that they hold at least."""
        if self.share is not None:
            return self.max_nodes or MAX_NODES, self.share
        return (LEADERS, SHARE) if self.max_nodes is None else (self.max_nodes, 1.0)


UNLIMITED = Limits()


def work(model: LensModel, rows: int, tokens: int) -> int:
    """Multiplications, as the head of this file counts them.

    Args:
        rows: nodes that read, times the passes over which they are averaged.
    """
    return rows * tokens * 12 * int(model.cfg.n_layers) * int(model.cfg.d_model) ** 2


def row_bytes(leaves: Collection[Tensor]) -> int:
    """What one gradient takes: held at every cut, and once more on its way back."""
    return 3 * sum(leaf.numel() for leaf in leaves) * next(iter(leaves)).element_size()


def room(
    nodes: int, leaves: Collection[Tensor], tokens: int, kind: str, *, chunk: int, max_bytes: int
) -> tuple[int, int]:
    """A chunk that fits, and the bytes that it takes.

    Gradients of a chunk are held at every cut and once more on their way back; edges once, and once more while they
    are pruned.

    Args:
        leaves: what is cut in one pass, or tensors of those shapes.

    Raises:
        GraphTooLargeError: none fits.
    """
    row, edges = row_bytes(leaves), 2 * nodes * nodes * next(iter(leaves)).element_size()
    left = max_bytes - edges
    if left < row:
        raise GraphTooLargeError(
            f"{nodes} nodes on {tokens} tokens need {(edges + row) / 2**30:.1f} GiB, more than "
            f"{max_bytes / 2**30:.1f}; {SHORTER if kind == 'components' else LESS}"
        )
    chunk = max(1, min(chunk, left // row, nodes))
    return chunk, edges + chunk * row


def timed(linear: Linearised, part: Reader, parts: int, size: int) -> float:
    """Seconds that so many chunks should take, from one of them; said on stderr where that is long."""
    expected = seconds_of(linear, part) * parts
    if expected > LONG:
        say(f"{parts} chunks", expected, size)
    return round(expected, 1)


def seconds_of(linear: Linearised, part: Reader) -> float:
    """What the gradients of one chunk take."""
    started = time.perf_counter()
    gradients(linear, part)
    return time.perf_counter() - started


def say(what: str, seconds: float, size: int) -> None:
    """The cost, on stderr."""
    print(f"attribution graph: {what}, about {seconds:.0f} s and {size / 2**20:.0f} MiB", file=sys.stderr)


class Cost(NamedTuple):
    """What is drawn of a graph, and what that should take.

    Args:
        nodes: at most; seconds: None where too few to be worth a trial.
        share: of all nodes' effect until which nodes are drawn; None: all are.
    """

    nodes: int
    seconds: float | None
    share: float | None = None

    @property
    def whole(self) -> bool:
        """Whether every node is drawn."""
        return self.share is None


def whole(model: LensModel, nodes: int, rows: int, tokens: int, leaves: Collection[Tensor], limits: Limits) -> bool:
    """Whether a graph is small enough to be drawn whole, by its sizes and the limits.

    Args:
        nodes: of all kinds; rows: those that read, times the passes over which they are averaged.
    """
    if limits.share not in (None, 1.0) or nodes > (limits.max_nodes or MAX_NODES):
        return False
    size = 2 * nodes * nodes * next(iter(leaves)).element_size() + row_bytes(leaves)
    return work(model, rows, tokens) <= WHOLE and (size <= limits.max_bytes or row_bytes(leaves) > limits.max_bytes)


def budgeted(
    limits: Limits, nodes: int, leaves: Collection[Tensor], tokens: int, kind: str, *, fixed: float, each: float,
    small: bool, beside: int = 0,
) -> Cost:  # fmt: skip
    """How many nodes are drawn within the limits, and what that should take; said on stderr where that is long.

    Args:
        fixed: seconds that are spent whatever the number of nodes; each: seconds for the edges into one.
        small: whether the graph would be drawn whole if there is time.
        beside: nodes that are drawn whatever the limits.

    Raises:
        GraphTooLargeError: not one.
    """
    number, row = next(iter(leaves)).element_size(), row_bytes(leaves)
    most, share = (nodes, None) if small else limits.asked
    if limits.max_seconds is not None and fixed + most * each > limits.max_seconds:
        most, share = math.floor((limits.max_seconds - fixed) / max(each, 1e-9)), limits.asked[1]
    if most < 1:
        raise GraphTooLargeError(
            f"scores and validation alone should take {fixed:.1f} s and the edges into each node {each:.2g} s, more "
            f"than max_seconds={limits.max_seconds:g}, so that no node would be drawn; allow "
            f"max_seconds={math.ceil(2 * (fixed + 10 * each))}, or pass validate=False"
        )
    spare = math.isqrt(max((limits.max_bytes - row) // (2 * number), 0)) - beside
    if share is not None:
        most = min(most, nodes, max(spare, 1))
    _, size = room(most + beside, leaves, tokens, kind, chunk=limits.chunk, max_bytes=limits.max_bytes)
    if fixed + most * each > LONG:
        what = f"{nodes} nodes" + ("" if share is None else f", of which at most {most} are drawn")
        led = 2 * (most + beside) ** 2 * number + LED_BYTES
        say(what, fixed + most * each, size if share is None else min(size, led))
    return Cost(most, round(fixed + most * each, 1), share)
