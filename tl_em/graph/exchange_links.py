"""The links of a file, between its nodes: every one checked, told apart where ids do not, and an order that they allow.

circuit-tracer up to 0.5.0 gives the error of layer L the id ``0_L_pos``, which is also latent L of layer 0. The nodes
are told apart by ``feature_type``, the links between them by what can be true (nothing leads into an error, nothing
leads backwards), then by the order in which that program writes them: the sources of a target stand as the nodes do. A
link that could still be either's is given to the error, as that program's own page does, so that nothing is called
explained which may not be; how many there are is told.

Source: circuit-tracer 0.5.0 (MIT), for the order of its links.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.graph.exchange_format import FileLinks, Origin, a_list, a_number, an_object, said
from tl_em.graph.nodes import STAGES, Graph, Node


# -- links -------------------------------------------------------------------------------------------------------------
def links_of(value: Any, nodes: Sequence[Node], by_id: Mapping[str, list[int]]) -> tuple[FileLinks, int]:
    """The file's links, and how many of them could be either's of two nodes with one id."""
    listed = a_list(value, "links")
    row = {name: at[0] for name, at in by_id.items()}
    try:
        sources = np.fromiter(map(row.__getitem__, [link["source"] for link in listed]), np.int32, len(listed))
        targets = np.fromiter(map(row.__getitem__, [link["target"] for link in listed]), np.int32, len(listed))
        weights = np.array([link["weight"] for link in listed], dtype=np.float64).reshape(len(listed))
    except (KeyError, TypeError, ValueError, OverflowError):
        sources, targets, weights = _links_one_by_one(listed, row)
    if not np.isfinite(weights).all():
        at = int(np.flatnonzero(~np.isfinite(weights))[0])
        raise ValueError(f"links[{at}].weight is {said(listed[at]['weight'])} where a finite number belongs")
    shared = {places[0]: places for places in by_id.values() if len(places) > 1}
    doubtful = _told_apart(sources, targets, nodes, shared) if shared else 0
    _check_repeated(sources, targets, weights, len(nodes))
    plain = set(map(len, listed)) <= {3}
    whole = {} if plain else {at: link for at, link in enumerate(listed) if len(link) != 3}
    return FileLinks(sources, targets, weights, whole), doubtful


def _links_one_by_one(listed: Sequence[Any], row: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The slow way, which names the first field that is wrong."""
    ends: list[tuple[int, int]] = []
    weights = np.zeros(len(listed))
    for at, each in enumerate(listed):
        link = an_object(each, f"links[{at}]")
        for end in ("source", "target"):
            if link.get(end) is None:
                raise ValueError(f"links[{at}].{end} is missing")
            if str(link[end]) not in row:
                raise ValueError(f"links[{at}].{end} is {said(link[end])}, and no node has that node_id")
        ends.append((row[str(link["source"])], row[str(link["target"])]))
        weight = a_number(link.get("weight"), f"links[{at}].weight")
        if weight is None:
            raise ValueError(f"links[{at}].weight is missing")
        weights[at] = weight
    sources, targets = np.array(ends, dtype=np.int32).reshape(-1, 2).T
    return sources.copy(), targets.copy(), weights


def _check_repeated(
    sources: Int[np.ndarray, " link"], targets: Int[np.ndarray, " link"], weights: Float[np.ndarray, " link"], n: int
) -> None:
    """The same link twice is read once; twice with two weights, it has none."""
    keys = targets.astype(np.int64) * n + sources
    if len(keys) < 2 or (np.diff(keys) > 0).all():
        return
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero((np.diff(keys[order]) == 0) & (np.diff(weights[order]) != 0))
    if len(same):
        one, two = order[same[0]], order[same[0] + 1]
        raise ValueError(
            f"links[{two}] repeats links[{one}] with another weight ({weights[two]:g}, not {weights[one]:g}), so which "
            "of them is the effect is not said"
        )


def edges_of(links: FileLinks, order: Sequence[int], *, wide: bool) -> Float[Tensor, "node node"]:
    row = np.empty(len(order), dtype=np.int64)
    row[np.asarray(order, dtype=np.int64)] = np.arange(len(order))
    largest = np.abs(links.weights).max(initial=0.0)
    dtype = np.float64 if wide or largest > np.finfo(np.float32).max else np.float32
    edges = np.zeros((len(order), len(order)), dtype=dtype)
    edges[row[links.targets], row[links.sources]] = links.weights
    return torch.from_numpy(edges)


# -- two nodes with one id ---------------------------------------------------------------------------------------------
Shared = Mapping[int, Sequence[int]]
"""Places of all nodes with one of the file's ids, by the first of them, which is what a link was read as."""


def _told_apart(
    sources: Int[np.ndarray, " link"], targets: Int[np.ndarray, " link"], nodes: Sequence[Node], shared: Shared
) -> int:
    """Put the right one of several nodes with one id into links, in place; how many links could be more than one's."""
    first = np.array(list(shared))
    doubtful = 0
    for at in np.flatnonzero(np.isin(targets, first)).tolist():
        can = [c for c in shared[int(targets[at])] if nodes[c].kind not in ("error", "token")] or [int(targets[at])]
        targets[at] = can[0]
        doubtful += len(can) > 1
    open_: dict[int, Sequence[int]] = {}
    for at in np.flatnonzero(np.isin(sources, first)).tolist():
        every, target = shared[int(sources[at])], nodes[int(targets[at])]
        can = [c for c in every if _before(nodes[c], target)] or every
        sources[at] = can[0]
        if len(can) > 1:
            open_[at] = sorted(can)
    return doubtful + sum(_by_order(sources, run, open_) for run in _runs(targets, list(open_)))


def _before(one: Node, other: Node) -> bool:
    """Whether something can lead from one to the other."""
    return one.kind != "logit" and (one.layer < other.layer or other.kind == "logit")


def _runs(targets: Int[np.ndarray, " link"], some: Sequence[int]) -> list[range]:
    """Stretches of links with one target, those that hold some of the links."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(targets)) + 1, [len(targets)]])
    which = sorted(set((np.searchsorted(starts, some, side="right") - 1).tolist())) if some else []
    return [range(int(starts[at]), int(starts[at + 1])) for at in which]


def _by_order(sources: Int[np.ndarray, " link"], run: range, open_: Mapping[int, Sequence[int]]) -> int:
    """Choose by the order of a target's sources, where the links that are clear stand as the nodes do."""
    clear = [int(sources[at]) for at in run if at not in open_]
    ordered = all(a < b for a, b in pairwise(clear))
    ends = [at for at in run if at not in open_]
    doubtful, below = 0, -1
    for at in run:
        if at not in open_:
            below = int(sources[at])
            continue
        can = open_[at]
        after = next((int(sources[on]) for on in ends if on > at), None)
        fits = [c for c in can if below < c and (after is None or c < after)] if ordered else []
        twins = [on for on in run if on in open_ and open_[on] == can]
        if len(twins) == len(can):  # a link each, in their order
            fits = [can[twins.index(at)]]
        sources[at] = fits[0] if len(fits) == 1 else can[-1]
        below = fits[0] if len(fits) == 1 else below
        doubtful += len(fits) != 1
    return doubtful


# -- causal order ------------------------------------------------------------------------------------------------------
def order_of(nodes: Sequence[Node], links: FileLinks, own: Mapping[str, Any]) -> list[int]:
    """Places of the file's nodes in the graph's order: as it was written, or so that no link leads back."""
    if own:
        given = own.get("order")
        order = list(range(len(nodes))) if given is None else list(a_list(given, "metadata.tl_em.order"))
        if given is not None and sorted(map(str, order)) != sorted(map(str, range(len(nodes)))):
            raise ValueError(f"metadata.tl_em.order is no order of the {len(nodes)} nodes")
        return order
    order = sorted(range(len(nodes)), key=lambda at: _place(nodes[at]))
    row = np.empty(len(order), dtype=np.int64)
    row[np.asarray(order, dtype=np.int64)] = np.arange(len(order))
    if (row[links.targets] > row[links.sources]).all():
        return order
    return _sorted_by_links(order, row, links, [node.id for node in nodes])


def _place(node: Node) -> tuple[int, int, int]:
    """Where another program's node stands: tokens, then layers, then targets."""
    stage = STAGES.get(node.stream or "mlp_out", STAGES["mlp_out"])
    return {"token": 0, "logit": 2}.get(node.kind, 1), node.layer, stage


def _sorted_by_links(
    order: Sequence[int], row: Int[np.ndarray, " node"], links: FileLinks, ids: Sequence[str]
) -> list[int]:
    """The order changed as little as links ask for."""
    into = [0] * len(order)
    out: list[list[int]] = [[] for _ in order]
    for source, target in zip(links.sources.tolist(), links.targets.tolist(), strict=True):
        into[target] += 1
        out[source].append(target)
    ready = [int(row[at]) for at in range(len(order)) if not into[at]]
    heapq.heapify(ready)
    found: list[int] = []
    while ready:
        found.append(order[heapq.heappop(ready)])
        for target in out[found[-1]]:
            into[target] -= 1
            if not into[target]:
                heapq.heappush(ready, int(row[target]))
    if len(found) < len(order):
        ends = zip(links.sources.tolist(), links.targets.tolist(), strict=True)
        at, (s, t) = next((at, pair) for at, pair in enumerate(ends) if into[pair[0]] and into[pair[1]])
        raise ValueError(f"links[{at}], {ids[s]} -> {ids[t]}, is part of a circle, and no effect causes its cause")
    return found


# -- links as they are written -----------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class LinkRows:
    """Links as they are written: rows of the graph's nodes, the weight as text, and whole objects where they hold more.

    Args:
        edited: whether they are others than the file's.
    """

    sources: Int[np.ndarray, " link"]
    targets: Int[np.ndarray, " link"]
    text: Sequence[str]
    whole: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    edited: bool = True


def link_rows(edges: Float[Tensor, "node node"]) -> LinkRows:
    """Every edge that is not zero."""
    matrix = _matrix(edges)
    targets, sources = matrix.nonzero()
    return LinkRows(sources, targets, _decimals(matrix[targets, sources]))


def links_as_read(graph: Graph, origin: Origin) -> LinkRows:
    """The file's links that the graph still has, in the file's order and numbers, and then those that it has beside."""
    matrix, links = _matrix(graph.edges), origin.links
    row = np.array([graph.index.get(name, -1) for name in origin.nodes], dtype=np.int64)
    sources, targets = row[links.sources], row[links.targets]
    there = (sources >= 0) & (targets >= 0)
    sources, targets, weights = sources[there], targets[there], links.weights[there]
    now = matrix[targets, sources]
    with np.errstate(over="ignore"):
        same = now == weights.astype(matrix.dtype)
    kept = same | (now != 0)
    text = list(map(repr, weights.tolist()))
    for at, decimals in zip(np.flatnonzero(~same).tolist(), _decimals(now[~same]), strict=True):
        text[at] = decimals
    if not kept.all():
        text = [text[at] for at in np.flatnonzero(kept).tolist()]
    left = matrix != 0
    left[targets, sources] = False
    new_targets, new_sources = left.nonzero()
    whole = {}
    if links.whole:
        place = np.full(len(there), -1)
        place[np.flatnonzero(there)[kept]] = np.arange(int(kept.sum()))
        whole = {int(place[at]): each for at, each in links.whole.items() if place[at] >= 0}
    return LinkRows(
        np.concatenate([sources[kept], new_sources]), np.concatenate([targets[kept], new_targets]),
        text + _decimals(matrix[new_targets, new_sources]),
        whole, edited=not (there.all() and same.all()) or len(new_sources) > 0,
    )  # fmt: skip


def _matrix(edges: Float[Tensor, "node node"]) -> Float[np.ndarray, "node node"]:
    held = edges.detach().cpu()
    return (held if held.element_size() >= 4 else held.float()).numpy()


def _decimals(values: Float[np.ndarray, " link"]) -> list[str]:
    """The shortest decimals that read back as the same numbers."""
    return values.astype(str).tolist() if values.dtype == np.float32 else list(map(repr, values.tolist()))
