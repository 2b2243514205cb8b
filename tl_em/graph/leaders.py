"""Nodes first, edges where they matter: of a large graph every node is scored, the leading ones drawn.

    1  score every node: one backward pass a step of the rule            2  ablate the largest, and a sample, exactly
    3  lead: the largest, by their exact effect where it was measured, until they hold a share of all nodes' effect
    4  edges among those alone, each as in the whole graph: everything else is held fixed, drawn or not

Tokens that differ from what they are compared with are always drawn. What the edges out of a node do not sum to, to
reach its total, goes through nodes that are not drawn.

The control: ``validation`` is of the scores of all nodes; ``drawn`` says beside it what is left of the target when
every node that is not drawn is put to its reference (1: all of it).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from tl_em.graph.cost import LED_BYTES, LED_CHUNK, Cost, Limits, row_bytes
from tl_em.graph.edges import Wiring, drawn
from tl_em.graph.graph import AttributionGraph
from tl_em.graph.nodes import Graph, Node
from tl_em.graph.targets import text_of
from tl_em.graph.validation import ablatable, only, validated
from tl_em.models.hooks import LensModel


def led(model: LensModel, plan: Wiring, limits: Limits, *, seed: int = 0) -> AttributionGraph:
    """The graph of the nodes that lead, validated over all of them.

    Args:
        plan: every node scored, none wired.
        limits: as for the plan.
        seed: of the validation.
    """
    assert plan.cost is not None and plan.totals is not None and plan.wire is not None
    scored = scored_nodes(model, plan)
    if limits.validate:
        scored = validated(model, scored, plan, seed=seed)
    rows, share = leading(scored.nodes, plan.cost, limits.also)
    some = tuple(plan.written[row] for row in rows)
    kept = [*rows, *range(len(plan.written), len(scored.nodes))]
    part = replace(plan, written=some, totals=plan.totals[kept], passes=plan.wire(some))
    chunk = max(1, min(limits.chunk, LED_CHUNK, LED_BYTES // row_bytes(plan.cut)))
    graph = drawn(model, part, chunk=chunk, max_bytes=limits.max_bytes)
    said = {"nodes": len(rows), "of": len(plan.written), "share of the effect": round(share, 3)}
    if limits.validate:
        said |= _without_the_others(model, scored, plan, rows)
    nodes = tuple(replace(node, effect=scored.nodes[row].effect) for node, row in zip(graph.nodes, kept, strict=True))
    return replace(graph, nodes=nodes, settings={**graph.settings, "drawn": said}, validation=scored.validation)


def scored_nodes(model: LensModel, plan: Wiring) -> Graph:
    """Every node of a plan with its score, and no edges (which take no memory)."""
    assert plan.totals is not None
    nodes = tuple(replace(e.node, attribution=float(plan.totals[row])) for row, e in enumerate(plan.written))
    nodes += plan.goal.nodes
    edges = torch.zeros((), dtype=plan.goal.vectors.dtype).expand(len(nodes), len(nodes))
    return Graph(nodes, edges, tuple(text_of(model, token) for token in plan.encoded.ids), settings=plan.settings)


def leading(nodes: Sequence[Node], cost: Cost, also: Collection[str] = frozenset()) -> tuple[list[int], float]:
    """Rows of the nodes that are drawn, in order, and the share of all nodes' effect that they hold.

    Args:
        also: ids of nodes that are drawn beside those that lead.

    Example:
        >>> four = [Node("mlp", 0, at, attribution=score) for at, score in enumerate((1.0, -6.0, 0.5, 2.5))]
        >>> leading(four, Cost(3, None, 0.8))
        ([1, 3], 0.85)
    """
    sizes = {row: abs(_effect(node)) for row, node in enumerate(nodes) if node.kind not in ("token", "logit")}
    whole, held, found = sum(sizes.values()), 0.0, []
    for row in sorted(sizes, key=lambda row: -sizes[row])[: cost.nodes]:
        if found and held >= (cost.share or 1.0) * whole:
            break
        found.append(row)
        held += sizes[row]
    others = [row for row, node in enumerate(nodes) if node.kind == "token" or node.id in also]
    return sorted({*found, *others}), held / whole if whole else 1.0


def _effect(node: Node) -> float:
    return (node.attribution or 0.0) if node.effect is None else node.effect


def _without_the_others(model: LensModel, scored: Graph, plan: Wiring, rows: Sequence[int]) -> dict[str, Any]:
    """How much of the target is left with what is not drawn at its reference."""
    open_ = ablatable(scored)
    inside = set(open_)
    values = only(model, plan, [[], [row for row in rows if row in inside], open_], open_).tolist()
    stake = values[2] - values[0]
    return {"faithfulness": round((values[1] - values[0]) / stake, 3)} if abs(stake) > 1e-6 else {}
