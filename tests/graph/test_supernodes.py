"""Nodes of one role are grouped, nodes of another role or token are not."""

from __future__ import annotations

import pytest
import torch

from tl_em.errors import UsageError
from tl_em.graph.graph import AttributionGraph, Node
from tl_em.graph.supernodes import clustered


def planted() -> AttributionGraph:
    """Six features at token 0 in two roles, and one at token 1 with the first role's edges."""
    nodes = [Node("token", -1, p, p) for p in (0, 1)]
    nodes += [Node("feature", 0, 0, i) for i in range(6)] + [Node("feature", 0, 1, 0)]
    nodes += [Node("logit", 1, 1, i) for i in (0, 1)]
    edges = torch.zeros(len(nodes), len(nodes))
    g = torch.Generator().manual_seed(0)
    for row in range(2, 9):
        role = 0 if row == 8 else row % 2
        strength = 1 + torch.rand(2, generator=g)
        edges[row, role], edges[9 + role, row] = strength[0], strength[1]
    return AttributionGraph(tuple(nodes), edges, ("a", "b"))


def test_roles_are_told_apart_and_tokens_are_not_mixed() -> None:
    found = clustered(planted())
    assert {frozenset(members) for _, members in found.supernodes} == {
        frozenset({"0_0_0", "0_2_0", "0_4_0"}),
        frozenset({"0_1_0", "0_3_0", "0_5_0"}),
    }
    assert found.nodes == planted().nodes and torch.equal(found.edges, planted().edges)


def test_unlike_nodes_stay_alone() -> None:
    graph = planted()
    edges = graph.edges.clone()
    edges[2:9] = torch.randn(7, edges.shape[1], generator=torch.Generator().manual_seed(1)).tril(-3)
    assert clustered(AttributionGraph(graph.nodes, edges, graph.tokens), distance=0.05).supernodes == ()


def test_groups_are_drawn_and_written(tmp_path) -> None:
    from tl_em.graph.exchange_reading import load_graph

    found = clustered(planted())
    assert load_graph(found.save_json(tmp_path / "g.json")).supernodes == found.supernodes
    assert "3 features at 0" in found.save_html(tmp_path / "g.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("wrong", [{"distance": 0.0}, {"least": 1}])
def test_what_groups_nothing_is_refused(wrong) -> None:
    with pytest.raises(UsageError, match="group nothing"):
        clustered(planted(), **wrong)
