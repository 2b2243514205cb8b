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
from typing import TYPE_CHECKING, NamedTuple, SupportsFloat, SupportsInt

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_em.arguments import finite, whole
from tl_em.errors import NonFiniteError, UsageError
from tl_em.graph.nodes import G, Graph
from tl_em.models.torch_state import in_plain_torch

if TYPE_CHECKING:
    import pandas as pd

_EMPTY = 1e-10


class Scores(NamedTuple):
    """How much of a graph its nodes explain, 0 to 1."""

    replacement: float
    completeness: float


def normalised(edges: Float[Tensor, "node node"]) -> Float[Tensor, "node node"]:
    """Share of each source in a target's input, by absolute value.

    Raises:
        NonFiniteError: an edge is NaN or infinite, and so would be every share of its target.
    """
    size = edges.detach().abs()
    if not bool(size.isfinite().all()):
        raise NonFiniteError(
            f"{int((~size.isfinite()).sum())} of the graph's edges are NaN or infinite, so no share of influence is "
            "defined; attribute in float32 or float64 on finite weights, or take those edges out"
        )
    return size / size.sum(1, keepdim=True).clamp(min=_EMPTY)


def weights_of(graph: Graph) -> Float[Tensor, " node"]:
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
    _check_order(shares)
    total = weights.clone()
    for row in range(len(shares) - 1, -1, -1):
        if total[row] != 0:
            total[:row] += total[row] * shares[row, :row]
    return total - weights


def _check_order(shares: Float[Tensor, "node node"]) -> None:
    if bool(shares.triu().any()):
        raise UsageError("an edge points backwards, so influence is no finite sum; order the nodes causally")


@in_plain_torch
def scores(graph: Graph) -> Scores:
    """Replacement and completeness score of a graph."""
    shares, weights = normalised(graph.edges), weights_of(graph)
    total = influence(shares, weights)
    tokens, errors = total[graph.row("token")].sum(), total[graph.row("error")].sum()
    explained = 1 - shares[:, graph.row("error")].sum(1)
    reached = total + weights
    known = float(tokens + errors)
    return Scores(float(tokens) / known if known else math.nan, float((explained * reached).sum() / reached.sum()))


@in_plain_torch
def prune(graph: G, *, nodes: SupportsFloat = 0.8, edges: SupportsFloat = 0.98) -> G:
    """The part of a graph that holds most of the influence on its targets.

    Args:
        nodes: share of all nodes' influence to keep; edges: share of the remaining edges' to keep.

    Returns:
        A graph whose nodes carry ``influence``, cumulative in order of importance; ``settings`` says what was cut.

    Raises:
        UsageError: a share outside (0, 1].
    """
    nodes, edges = kept_share = finite("nodes", nodes), finite("edges", edges)
    for name, share in zip(("nodes", "edges"), kept_share, strict=True):
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
    graph: Graph, kept: Bool[Tensor, " node"], links: Bool[Tensor, "node node"], fixed: Bool[Tensor, " node"]
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


@in_plain_torch
def strongest_paths(graph: Graph, k: SupportsInt = 10) -> pd.DataFrame:
    """The k paths into the targets whose product of shares ``A`` (times the target's weight) is largest.

    A path begins at a node without a cause in the graph (a token, an error, whatever nothing feeds). Exact, by dynamic
    programming in causal order: the k best paths into a node end in one of the k best into one of its sources, and only
    the k sources with the best first path can be among them. Of equal paths the one through the earlier node is first.

    Args:
        k: how many.

    Returns:
        DataFrame with columns weight (product of shares), sign (of the product of edges), length, nodes (ids, source
        first) and path (text). The weights of all paths sum to the targets' weights.

    Raises:
        UsageError: k is no positive whole number, or an edge points backwards. NonFiniteError: an edge is NaN.
    """
    import pandas as pd

    if (count := whole("k", k)) < 1:
        raise UsageError(f"k={count} paths were asked for; give a positive number")
    shares = normalised(graph.edges)
    _check_order(shares)
    best = _best_paths(shares.double().cpu().numpy(), count)
    weights = weights_of(graph).double().tolist()
    ends = [(float(w) * weights[row], row, at) for row in graph.row("logit") for at, w in enumerate(best.weights[row])]
    rows = []
    for weight, row, at in sorted((end for end in ends if best.sources[end[1]].size), key=lambda end: -end[0])[:count]:
        path = best.path(row, at)
        negative = sum(float(graph.edges[t, s]) < 0 for s, t in pairwise(path)) % 2
        ids, text = [graph.nodes[each].id for each in path], " -> ".join(_said(graph, each) for each in path)
        rows.append((weight, -1 if negative else 1, len(path), ids, text))
    return pd.DataFrame(rows, columns=["weight", "sign", "length", "nodes", "path"])


class _Best(NamedTuple):
    """The best paths into each node, best first: product of shares, and by which source's which path it goes on."""

    weights: list[np.ndarray]
    sources: list[np.ndarray]
    ranks: list[np.ndarray]

    def path(self, row: int, at: int) -> list[int]:
        found = [row]
        while self.sources[row].size:
            row, at = int(self.sources[row][at]), int(self.ranks[row][at])
            found.append(row)
        return found[::-1]


def _best_paths(shares: Float[np.ndarray, "node node"], k: int) -> _Best:
    first, best = np.ones(len(shares)), _Best([], [], [])
    none = np.zeros(0, dtype=np.int64)
    for row, into in enumerate(shares):
        fed = np.flatnonzero(into)
        sources = fed[_largest(into[fed] * first[fed], k)]
        if not len(fed):  # a beginning
            best.weights.append(np.ones(1))
            best.sources.append(none)
            best.ranks.append(none)
            continue
        sizes = [min(len(best.weights[s]), k) for s in sources]
        values = np.concatenate([into[s] * best.weights[s] for s in sources])
        chosen = _largest(values, k)
        best.weights.append(values[chosen])
        best.sources.append(np.repeat(sources, sizes)[chosen])
        best.ranks.append(np.concatenate([np.arange(n) for n in sizes])[chosen])
        first[row] = best.weights[row][0]
    return best


def _largest(values: Float[np.ndarray, " value"], k: int) -> Int[np.ndarray, " chosen"]:
    """Places of the k largest, largest first and of equal ones the earlier first."""
    if len(values) > k:
        least = np.partition(values, len(values) - k)[len(values) - k]
        some = np.flatnonzero(values >= least)
        return some[np.argsort(-values[some], kind="stable")][:k]
    return np.argsort(-values, kind="stable")


def _said(graph: Graph, row: int) -> str:
    node = graph.nodes[row]
    number = "" if node.feature is None or node.kind in ("token", "logit", "error") else f" {node.feature}"
    label = f" {node.label!r}" if node.label else ""
    where = "" if node.kind == "logit" else f" L{node.layer} pos {node.pos}" if node.layer >= 0 else f" pos {node.pos}"
    return f"{node.kind}{number}{label}{where}"
