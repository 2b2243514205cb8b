"""What changed between two graphs of one prompt: base beside tuned, node by node and link by link.

    appeared   in tuned only             stronger   in both, |tuned| > |base| by more than ``least`` of the larger
    vanished   in base only              weaker     the other way round             same   all else

A node's size is its attribution (its activation where there is none), a link's its direct effect; a change of sign is a
change by more than the larger of the two. A change below ``FLOOR`` of the largest value of either graph is none: next
to nothing, doubled, is next to nothing. Control: *appeared* in a pruned graph may mean that a node crossed the pruning
threshold, so compare graphs that were not pruned, where every node has its size in both. And the graphs of two seeds of
a benign fine-tune show how much differs when nothing of interest does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from tl_em.errors import UsageError
from tl_em.graph.nodes import Graph, Node, strongest_links
from tl_em.models.torch_state import in_plain_torch

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["appeared", "vanished", "stronger", "weaker", "same"]
LEAST = 0.2
"""A change below this share of the larger of two values is called none."""
FLOOR = 0.01


@dataclass(frozen=True)
class Change:
    """One node or link in two graphs.

    Args:
        what: ``"node"`` or ``"link"``.
        id: of the node; of a link ``source -> target``.
        source: of a link; target: of a link.
        status: appeared, vanished, stronger, weaker or same.
        base: value in base, None where it is absent; tuned: likewise.
    """

    what: Literal["node", "link"]
    id: str
    status: Status
    base: float | None
    tuned: float | None
    source: str = ""
    target: str = ""

    @property
    def change(self) -> float:
        """tuned - base, with 0 for what is absent."""
        return (self.tuned or 0.0) - (self.base or 0.0)


@dataclass(frozen=True, eq=False)
class Compared:
    """Two graphs of one prompt and what differs between them; its fields are those of ``em.graph.GraphDiff``."""

    base: Graph
    tuned: Graph
    rows: tuple[Change, ...]
    least: float = LEAST

    @property
    def nodes(self) -> tuple[Change, ...]:
        """The nodes' rows."""
        return tuple(row for row in self.rows if row.what == "node")

    @property
    def links(self) -> tuple[Change, ...]:
        """The links' rows."""
        return tuple(row for row in self.rows if row.what == "link")

    @cached_property
    def union(self) -> tuple[Node, ...]:
        """Nodes of either graph, the tuned one's where both have it, in causal order."""
        mine = self.tuned.index
        gone = [node for node in self.base.nodes if node.id not in mine]
        return tuple(sorted((*gone, *self.tuned.nodes), key=lambda node: node.place[:2]))

    def count(self, what: str = "node") -> dict[str, int]:
        """How many nodes (or links) have each status."""
        found = [row.status for row in self.rows if row.what == what]
        return {status: found.count(status) for status in ("appeared", "vanished", "stronger", "weaker", "same")}

    def to_pandas(self) -> pd.DataFrame:
        """One row a node and a link: what, id, source, target, status, base, tuned, change."""
        import pandas as pd

        columns = ["what", "id", "source", "target", "status", "base", "tuned", "change"]
        return pd.DataFrame([[getattr(row, name) for name in columns] for row in self.rows], columns=columns)

    def __repr__(self) -> str:
        said = {what: ", ".join(f"{n} {status}" for status, n in self.count(what).items() if n)
                for what in ("node", "link")}  # fmt: skip
        return f"GraphDiff(nodes: {said['node'] or 'none'}; links: {said['link'] or 'none'})"


@in_plain_torch
def changes(base: Graph, tuned: Graph, *, least: float = LEAST) -> tuple[Change, ...]:
    """Compare two graphs of one prompt, node by node (by id) and link by link.

    Args:
        base: graph of the model before the fine-tune.
        tuned: graph of the fine-tuned model.
        least: changes below this share of the larger value are ``"same"``.

    Returns:
        rows with a status, nodes first, in each the largest change first.

    Raises:
        UsageError: the prompts' tokens differ, so that a position is not the same token; or no target is shared, so
            that the two explain different things.

    Example:
        >>> import torch
        >>> nodes = (Node("token", -1, 0, 7, attribution=1.0), Node("logit", 2, 0, 9, attribution=1.0))
        >>> weak, strong = (Graph(nodes, torch.tensor([[0.0, 0.0], [w, 0.0]]), ("cat",)) for w in (0.5, 1.0))
        >>> changes(weak, strong)[-1].status
        'stronger'
    """
    _check(base, tuned)
    sizes = [
        {n.id: float((n.activation if n.attribution is None else n.attribution) or 0.0) for n in graph.nodes}
        for graph in (base, tuned)
    ]
    floor = _floor(*sizes)
    nodes = [Change("node", name, _status(b, t, least, floor), b, t) for name, b, t in _matched(*sizes)]
    weights = [{(s, t): w for s, t, w in strongest_links(graph).itertuples(index=False)} for graph in (base, tuned)]
    floor = _floor(*weights)
    links = [Change("link", f"{s} -> {t}", _status(b, w, least, floor), b, w, source=s, target=t)
             for (s, t), b, w in _matched(*weights)]  # fmt: skip
    rows = (sorted(part, key=lambda row: (-abs(row.change), row.id)) for part in (nodes, links))
    return tuple(row for part in rows for row in part)


def _check(base: Graph, tuned: Graph) -> None:
    if base.tokens != tuned.tokens:
        at = next((i for i, (a, b) in enumerate(zip(base.tokens, tuned.tokens, strict=False)) if a != b),
                  min(len(base.tokens), len(tuned.tokens)))  # fmt: skip
        raise UsageError(
            f"the two graphs' tokens differ ({len(base.tokens)} and {len(tuned.tokens)} of them; the first difference "
            f"is at {at}), so a position is not the same token in both; attribute both models on one prompt"
        )
    if not {(node.id, node.label) for node in base.targets} & {(node.id, node.label) for node in tuned.targets}:
        raise UsageError(
            "the two graphs share no target, so they explain different things; pass one target=… to both attribute(…)"
        )


def _matched(base: Mapping, tuned: Mapping) -> list[tuple]:
    """Every key of either, with its value in base and in tuned."""
    return [(key, base.get(key), tuned.get(key)) for key in dict.fromkeys((*base, *tuned))]


def _floor(base: Mapping, tuned: Mapping) -> float:
    return FLOOR * max((abs(value) for part in (base, tuned) for value in part.values()), default=0.0)


def _status(base: float | None, tuned: float | None, least: float, floor: float) -> Status:
    if base is None:
        return "appeared"
    if tuned is None:
        return "vanished"
    if abs(tuned - base) <= max(floor, least * max(abs(tuned), abs(base))):
        return "same"
    return "stronger" if abs(tuned) >= abs(base) else "weaker"
