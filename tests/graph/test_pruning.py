"""Influence on a DAG is the sum over all paths; pruning keeps what holds it; paths are what influence is a sum of."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tl_em.errors import NonFiniteError, UsageError
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


def every_path(graph: AttributionGraph) -> list[tuple[float, list[str]]]:
    """All paths by walking back from each target, best first: what the k best are taken from."""
    shares, weights = normalised(graph.edges).tolist(), weights_of(graph).tolist()

    def into(row: int) -> list[tuple[float, list[int]]]:
        fed = [(share, s) for s, share in enumerate(shares[row]) if share]
        return [(w * share, [*path, row]) for share, s in fed for w, path in into(s)] or [(1.0, [row])]

    found = [(w * weights[row], path) for row in graph.row("logit") for w, path in into(row) if len(path) > 1]
    return sorted(((w, [graph.nodes[row].id for row in path]) for w, path in found), key=lambda each: -each[0])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 3, 40])
def test_the_k_best_paths_are_those_of_all_paths(seed: int, k: int) -> None:
    graph = random_graph(seed, inner=14)
    g = torch.Generator().manual_seed(seed + 100)
    graph.edges[:] *= torch.rand(graph.edges.shape, generator=g) < 0.7
    graph.edges[:] *= torch.tensor([1.0, 1e-3, 1e3])[torch.randint(3, graph.edges.shape, generator=g)]
    best, found = every_path(graph), strongest_paths(graph, k)
    assert len(best) > 100 and len(found) == k
    assert found.weight.tolist() == pytest.approx([w for w, _ in best[:k]], rel=1e-12)  # float64 products
    for weight, ids in zip(found.weight, found.nodes, strict=True):
        assert any(ids == path and weight == pytest.approx(w, rel=1e-12) for w, path in best)
    assert len({tuple(ids) for ids in found.nodes}) == k


def test_equal_paths_are_told_in_causal_order_and_none_is_lost() -> None:
    edges = torch.zeros(6, 6)
    edges[4, :4] = 1.0  # four equal tokens into one latent
    edges[5, 4] = -2.0
    found = strongest_paths(made(edges, "ttttfl"), 3)
    assert [ids[0] for ids in found.nodes] == ["E_0_0", "E_1_1", "E_2_2"]
    assert found.weight.tolist() == [0.25] * 3 and found.sign.tolist() == [-1] * 3


def test_paths_of_a_dense_graph_of_three_thousand_nodes_take_seconds() -> None:
    n = 3061
    edges = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).tril(-1)
    edges[:20] = 0
    graph = made(edges, "t" * 20 + "f" * (n - 30) + "l" * 10, (0.1,) * 10)
    started = time.process_time()
    assert len(graph.paths(5)) == 5
    assert time.process_time() - started < 5


@pytest.mark.parametrize("call", [lambda g: g.paths(3), lambda g: g.prune(), scores])
def test_edges_that_are_not_finite_or_lead_back_are_refused(call: Callable[[AttributionGraph], object]) -> None:
    call(random_graph())
    for spoil, error in ((float("nan"), NonFiniteError), (float("inf"), NonFiniteError), (None, UsageError)):
        graph = random_graph()
        graph.edges[(0, 3) if spoil is None else (4, 3)] = 1.0 if spoil is None else spoil
        with pytest.raises(error):
            call(graph)


@pytest.mark.parametrize("k", [-1, 1.5, float("nan"), True, np.float32(2)])
def test_a_number_of_paths_is_whole_and_positive(k: Any) -> None:
    assert len(random_graph().paths(np.int64(2))) == len(random_graph().paths(torch.tensor(2))) == 2
    with pytest.raises(UsageError, match="k="):
        random_graph().paths(k)


@pytest.mark.parametrize("share", [float("nan"), float("inf"), -0.1, np.float32("nan"), True])
def test_a_share_is_a_finite_number(share: Any) -> None:
    random_graph().prune(nodes=np.float32(0.5), edges=torch.tensor(0.9))
    for name in ("nodes", "edges"):
        with pytest.raises(UsageError, match=name):
            random_graph().prune(**{name: share})
