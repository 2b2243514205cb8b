"""Which nodes and edges matter: influence on the targets, the part of a graph that holds most of it, strongest paths.

    A = |edges|, each row divided by its sum        B = w (A + A^2 + ...)        w: the targets' weights

The graph has no cycles and its rows stand in causal order, so B is one pass from the last row to the first. Nodes are
kept, most influential first, until they hold a share of all influence; then edges, by ``A[t, s] (B[t] + w[t])``; then
whatever lost its last edge goes. Tokens and targets always stay.

    replacement  = B(tokens) / (B(tokens) + B(errors))
    completeness = sum_t (B + w)[t] (1 - share of t's input that comes from errors) / sum (B + w)

Both say how much of the picture is explained, not whether it is right: for that see ``validation``.

Source: Ameisen et al. 2025, "Circuit Tracing", methods on pruning; the rule agrees with circuit-tracer's on a fixture.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_em.errors import UsageError
from tl_em.graph.graph import AttributionGraph

if TYPE_CHECKING:
    import pandas as pd

_EMPTY = 1e-10


class Scores(NamedTuple):
    """How much of a graph its nodes explain, 0 to 1."""

    replacement: float
    completeness: float


def normalised(edges: Float[Tensor, "node node"]) -> Float[Tensor, "node node"]:
    """Share of each source in a target's input, by absolute value."""
    size = edges.abs()
    return size / size.sum(1, keepdim=True).clamp(min=_EMPTY)


def weights_of(graph: AttributionGraph) -> Float[Tensor, " node"]:
    """The targets' weights, 0 for every other node."""
    found = [1.0 if n.weight is None else n.weight for n in graph.nodes]
    rows = [w if n.kind == "logit" else 0.0 for n, w in zip(graph.nodes, found, strict=True)]
    return torch.tensor(rows, dtype=graph.edges.dtype)


def influence(shares: Float[Tensor, "node node"], weights: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    """``w (A + A^2 + ...)`` for a strictly lower triangular A, in one pass.

    Example:
        >>> chain = torch.tensor([[0., 0., 0.], [1., 0., 0.], [.5, .5, 0.]])
        >>> influence(chain, torch.tensor([0., 0., 1.])).tolist()
        [1.0, 0.5, 0.0]
    """
    if bool(shares.triu().any()):
        raise UsageError("an edge points backwards, so influence is no finite sum; order the nodes causally")
    total = weights.clone()
    for row in range(len(shares) - 1, -1, -1):
        if total[row] != 0:
            total[:row] += total[row] * shares[row, :row]
    return total - weights


def scores(graph: AttributionGraph) -> Scores:
    """Replacement and completeness score of a graph."""
    shares, weights = normalised(graph.edges), weights_of(graph)
    total = influence(shares, weights)
    tokens, errors = total[graph.row("token")].sum(), total[graph.row("error")].sum()
    explained = 1 - shares[:, graph.row("error")].sum(1)
    reached = total + weights
    known = float(tokens + errors)
    return Scores(float(tokens) / known if known else math.nan, float((explained * reached).sum() / reached.sum()))


def prune(graph: AttributionGraph, *, nodes: float = 0.8, edges: float = 0.98) -> AttributionGraph:
    """The part of a graph that holds most of the influence on its targets.

    Args:
        nodes: share of all nodes' influence to keep; edges: share of the remaining edges' to keep.

    Returns:
        A graph whose nodes carry ``influence``, cumulative in order of importance; ``settings`` says what was cut.

    Raises:
        UsageError: a share outside (0, 1].
    """
    for name, share in (("nodes", nodes), ("edges", edges)):
        if not 0 < share <= 1:
            raise UsageError(f"{name}={share} is no share; give one in (0, 1], e.g. prune(nodes=.8, edges=.98)")
    shares, weights = normalised(graph.edges), weights_of(graph)
    total = influence(shares, weights)
    kept = total >= _threshold(total, nodes)
    fixed = torch.zeros(len(kept), dtype=torch.bool)
    fixed[graph.row(("token", "logit"))] = True
    kept |= fixed
    left = normalised(graph.edges * kept[:, None] * kept[None])
    reached = influence(left, weights) + weights
    by_edge = left * reached[:, None]
    links = by_edge >= _threshold(by_edge.flatten(), edges)
    kept, links = _connected(graph, kept, links, fixed)
    rows = kept.nonzero().flatten().tolist()
    order = _cumulative(total)
    part = graph.keep(rows, (graph.edges * links)[rows][:, rows])
    named = tuple(replace(n, influence=float(order[r])) for n, r in zip(part.nodes, rows, strict=True))
    cut = {"nodes": nodes, "edges": edges, "nodes_before": len(graph.nodes), "nodes_after": len(rows)}
    return replace(part, nodes=named, settings={**graph.settings, "pruned": cut})


def _threshold(values: Float[Tensor, " value"], share: float) -> Tensor:
    """The least value among the largest ones that hold this share of the sum."""
    ordered, _ = values.sort(descending=True)
    sums = ordered.cumsum(0) / ordered.sum().clamp(min=_EMPTY)
    return ordered[min(int(torch.searchsorted(sums, share)), len(ordered) - 1)]


def _cumulative(total: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    ordered, at = total.sort(descending=True)
    found = torch.empty_like(total)
    found[at] = (ordered.cumsum(0) / ordered.sum().clamp(min=_EMPTY)).clamp(max=1)
    return found


def _connected(
    graph: AttributionGraph, kept: Bool[Tensor, " node"], links: Bool[Tensor, "node node"], fixed: Bool[Tensor, " node"]
) -> tuple[Bool[Tensor, " node"], Bool[Tensor, "node node"]]:
    """Without nodes that lead nowhere, and without latents that nothing feeds (errors and components have no cause)."""
    fed = torch.ones_like(kept)
    fed[graph.row("feature")] = False
    while True:
        links = links & kept[:, None] & kept[None]
        alive = fixed | (kept & links.any(0) & (fed | links.any(1)))
        if bool((alive == kept).all()):
            return kept, links
        kept = alive


# --- Paths ------------------------------------------------------------------------------------------------------------


def strongest_paths(graph: AttributionGraph, k: int = 10) -> pd.DataFrame:
    """The k paths into the targets whose product of shares ``A`` (times the target's weight) is largest.

    A path begins at a node without a cause in the graph (a token, an error, whatever nothing feeds).

    Args:
        k: how many.

    Returns:
        DataFrame with columns weight (product of shares), sign (of the product of edges), length, nodes (ids, source
        first) and path (text). The weights of all paths sum to the targets' weights.

    Raises:
        UsageError: k is not positive.
    """
    import pandas as pd

    if k < 1:
        raise UsageError(f"k={k} paths were asked for; give a positive number")
    shares, weights = normalised(graph.edges).tolist(), weights_of(graph)
    best: list[list[tuple[float, tuple[int, ...]]]] = []
    for row, into in enumerate(shares):
        found = [
            (share * weight, (*path, row)) for s, share in enumerate(into) if share for weight, path in best[s]
        ] or [(1.0, (row,))]
        best.append(sorted(found, key=lambda each: -each[0])[:k])
    ends = [(weight * float(weights[row]), path) for row in graph.row("logit") for weight, path in best[row]]
    ends = sorted((each for each in ends if len(each[1]) > 1), key=lambda each: -each[0])[:k]
    rows = []
    for weight, path in ends:
        product = math.prod(float(graph.edges[t, s]) for s, t in pairwise(path))
        ids = [graph.nodes[row].id for row in path]
        text = " -> ".join(_said(graph, row) for row in path)
        rows.append((weight, 1 if product >= 0 else -1, len(path), ids, text))
    return pd.DataFrame(rows, columns=["weight", "sign", "length", "nodes", "path"])


def _said(graph: AttributionGraph, row: int) -> str:
    node = graph.nodes[row]
    number = "" if node.feature is None or node.kind in ("token", "logit", "error") else f" {node.feature}"
    label = f" {node.label!r}" if node.label else ""
    where = "" if node.kind == "logit" else f" L{node.layer} pos {node.pos}" if node.layer >= 0 else f" pos {node.pos}"
    return f"{node.kind}{number}{label}{where}"
