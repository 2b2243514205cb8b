"""Groups of nodes that play one part: the same kind of edges in and out, at the same token.

    d(i, j) = 1 - cosine of the two nodes' edges, incoming and outgoing, each side scaled to length 1

Average linkage, cut at a distance. Features and components of one position are compared with each other only, so that
a group can be drawn in one place. The control is the eye: open a group before you name it.

Source: grouping by role in the circuit, Ameisen et al. 2025 (there by hand).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import SupportsFloat, SupportsInt

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import finite, whole
from tl_em.errors import NonFiniteError, UsageError
from tl_em.graph.nodes import G
from tl_em.models.torch_state import in_plain_torch

GROUPED = ("feature", "head", "mlp")


@in_plain_torch
def clustered(graph: G, *, distance: SupportsFloat = 0.5, least: SupportsInt = 2) -> G:
    """The graph with supernodes by clustering, in place of those that it has.

    Args:
        graph: best a pruned one; its edges are what nodes are compared by.
        distance: cosine distance (0 to 2) at which groups are cut; smaller makes fewer, tighter groups.
        least: members of a group, at least.

    Raises:
        UsageError: ``distance`` is not above 0, or ``least`` below 2.

    Example:
        >>> from tl_em.graph.nodes import Graph, Node
        >>> nodes = (Node("token", -1, 0, 7), *(Node("feature", 0, 0, i) for i in range(3)), Node("logit", 1, 0, 9))
        >>> edges = torch.zeros(5, 5)
        >>> edges[1:4, 0], edges[4, 1:4] = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([3.0, 4.0, 1.0])
        >>> clustered(Graph(nodes, edges, ("a",))).supernodes
        (('2 features at 0', ('0_0_0', '0_1_0')),)
    """
    cut, members = finite("distance", distance), whole("least", least)
    if cut <= 0 or members < 2:
        raise UsageError(f"distance={cut} and least={members} group nothing; give a distance above 0, groups of 2")
    if not bool(graph.edges.isfinite().all()):
        raise NonFiniteError("edges are NaN or infinite, so nodes cannot be compared by them; attribute in float32")
    places: dict[tuple[str, int], list[int]] = defaultdict(list)
    for row in graph.row(GROUPED):
        places[graph.nodes[row].kind, graph.nodes[row].pos].append(row)
    found = []
    for (kind, pos), rows in places.items():
        for group in _groups(_profiles(graph.edges, rows), cut):
            if len(group) >= members:
                found.append((f"{len(group)} {kind}s at {pos}", tuple(graph.nodes[rows[i]].id for i in group)))
    return replace(graph, supernodes=tuple(found))


def _profiles(edges: Float[Tensor, "node node"], rows: list[int]) -> Float[np.ndarray, "row two_nodes"]:
    sides = (edges[rows], edges[:, rows].T)
    return torch.cat([x / x.norm(dim=1, keepdim=True).clamp_min(1e-30) for x in sides], 1).double().numpy()


def _groups(profiles: Float[np.ndarray, "row two_nodes"], distance: float) -> list[list[int]]:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    if len(profiles) < 2:
        return []
    apart = np.nan_to_num(pdist(profiles, "cosine"), nan=2.0)  # a node without edges is like no other
    labels = fcluster(linkage(apart, "average"), distance, "distance")
    return [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
