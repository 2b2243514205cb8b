"""Influence on a DAG is the sum over all paths; pruning keeps what holds it; paths are what influence is a sum of."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tl_em.errors import UsageError
from tl_em.graph.graph import AttributionGraph, Node
from tl_em.graph.pruning import influence, normalised, prune, scores, strongest_paths, weights_of


def made(edges: Tensor, kinds: str, weights: tuple[float, ...] = ()) -> AttributionGraph:
    """Nodes by letter: t(oken), f(eature), e(rror), l(ogit)."""
    names = {"t": "token", "f": "feature", "e": "error", "l": "logit"}
    nodes, given = [], iter(weights)
    for row, letter in enumerate(kinds):
        layer = {"t": -1, "l": 99}.get(letter, row)
        weight = next(given, 1.0) if letter == "l" else None
        nodes.append(Node(names[letter], layer, row, feature=row, weight=weight))  # pyright: ignore
    return AttributionGraph(tuple(nodes), edges, tuple("x" * len(kinds)))


def random_graph(seed: int = 0, inner: int = 12) -> AttributionGraph:
    g = torch.Generator().manual_seed(seed)
    kinds = "ttt" + "".join("fe"[int(torch.rand(1, generator=g) < 0.3)] for _ in range(inner)) + "ll"
    n = len(kinds)
    edges = (torch.randn(n, n, generator=g, dtype=torch.float64)).tril(-1)
    edges[[row for row, kind in enumerate(kinds) if kind in "te"]] = 0  # nothing leads into tokens and errors
    edges[-1, -2] = 0
    return made(edges, kinds, (0.7, 0.2))


def test_influence_is_the_sum_of_all_powers() -> None:
    graph = random_graph()
    shares, weights = normalised(graph.edges), weights_of(graph)
    power, total = weights @ shares, torch.zeros_like(weights)
    for _ in range(len(weights)):
        total, power = total + power, power @ shares
    torch.testing.assert_close(influence(shares, weights), total, rtol=1e-12, atol=1e-12)  # float64 sums
    assert total.max() > 0.1


def test_influence_of_a_graph_with_a_cycle_is_refused() -> None:
    with pytest.raises(UsageError, match="backwards"):
        influence(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0.0, 1.0]))


def test_all_paths_sum_to_the_targets_weights() -> None:
    """Every path starts where nothing leads in, so shares multiply to a distribution over paths."""
    graph = random_graph(inner=6)
    paths = strongest_paths(graph, 10_000)
    assert paths.weight.sum() == pytest.approx(0.9, abs=1e-9)
    assert list(paths.weight) == sorted(paths.weight, reverse=True)
    first = strongest_paths(graph, 5)
    assert first.weight.tolist() == pytest.approx(paths.weight[:5].tolist())
    for ids, sign in zip(first.nodes, first.sign, strict=True):
        steps = [float(graph.edges[graph.index[t], graph.index[s]]) for s, t in pairwise(ids)]
        assert (torch.tensor(steps).prod() >= 0) == (sign > 0)


def test_a_strong_path_is_kept_and_a_weak_one_is_not() -> None:
    # token 0 -> feature 2 -> target; token 1 -> feature 3 -> target, a hundred times weaker
    edges = torch.zeros(5, 5)
    edges[2, 0] = edges[3, 1] = 1.0
    edges[4, 2], edges[4, 3] = -1.0, 0.01
    graph = made(edges, "ttffl")
    kept = prune(graph, nodes=0.8, edges=0.98)
    assert [node.pos for node in kept.nodes] == [0, 1, 2, 4]  # tokens stay
    assert kept.edges[-1].tolist() == [0.0, 0.0, -1.0, 0.0]
    assert len(prune(graph, nodes=1.0, edges=1.0).nodes) == 5
    assert kept.settings["pruned"]["nodes_before"] == 5
    influences = [node.influence for node in kept.nodes]
    assert all(x is not None and 0 < x <= 1 for x in influences)


def test_a_latent_that_loses_its_causes_goes_and_an_error_stays() -> None:
    # target <- feature 2 <- feature 1 <- token 0, and target <- error 3; feature 1 is pruned, so 2 has no cause left
    edges = torch.zeros(5, 5)
    edges[1, 0] = 1.0
    edges[2, 1] = 1.0
    edges[4, 2], edges[4, 3] = 0.3, 1.0
    graph = made(edges, "tffel")
    whole = ["token", "feature", "feature", "error", "logit"]
    assert [n.kind for n in prune(graph, nodes=1.0, edges=1.0).nodes] == whole
    assert [n.kind for n in prune(graph, nodes=1.0, edges=0.5).nodes] == ["token", "error", "logit"]


def test_scores_of_a_graph_without_errors_are_1_and_of_errors_alone_are_not() -> None:
    edges = torch.zeros(3, 3)
    edges[1, 0] = edges[2, 1] = 1.0
    assert scores(made(edges, "tfl")) == (1.0, 1.0)
    only_error = torch.zeros(3, 3)
    only_error[2, 1] = 1.0
    # the target's input is all error (0), the error node has no input of its own (1): their mean by influence
    assert scores(made(only_error, "tel")) == (0.0, 0.5)


@pytest.mark.parametrize("options", [{"nodes": 0.0}, {"edges": 1.1}])
def test_a_share_outside_0_to_1_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="share"):
        prune(random_graph(), **options)
    with pytest.raises(UsageError, match="positive"):
        strongest_paths(random_graph(), 0)
