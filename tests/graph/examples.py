"""Graphs for the tests of this folder: a small one that can be checked by hand, and one of a given size."""

from __future__ import annotations

import random
from typing import Any

import torch

from tl_em.graph.graph import AttributionGraph, Node
from tl_em.stats import Estimate

TOKENS = ("<bos>", " the", " cat", " sat")


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.05, value + 0.05, n=120, n_effective=120.0, method="bootstrap", seed=0)


def small(scale: float = 1.0, **changes: Any) -> AttributionGraph:
    """Two tokens, an error, two latents, a target: the strongest path runs cat -> 12 -> 7 -> sat.

    Shares of input: 12 gets .75 from cat and .25 from the; 7 gets .8 from 12 and .2 from the error; the target gets
    2/3 from 7, 2/9 from 12 and 1/9 from the error.
    """
    nodes = (
        Node("token", -1, 1, 40, label=" the"),
        Node("token", -1, 2, 41, label=" cat"),
        Node("feature", 0, 2, 12, activation=2.5, label="animal", attribution=1.5 * scale, effect=1.4 * scale,
             extra={"top": [[" sat", 1.0]], "link": "https://www.neuronpedia.org/x/0/12", "interval": [1.0, 1.8]}),
        Node("error", 0, 3, -1, attribution=-0.25 * scale),
        Node("feature", 1, 3, 7, activation=1.0, label="verb next", attribution=3.0 * scale, effect=3.1 * scale),
        Node("logit", 2, 3, 55, label=" sat", weight=0.9),
    )  # fmt: skip
    edges = torch.zeros(6, 6)
    edges[2, 0], edges[2, 1] = 0.5, 1.5
    edges[4, 2], edges[4, 3] = 2.0, -0.5
    edges[5, 2], edges[5, 3], edges[5, 4] = 1.0, -0.5, 3.0
    about: dict[str, Any] = {
        "model": "toy",
        "prompt": "the cat sat",
        "settings": {"rule": "frozen"},
        "validation": {"pearson": estimate(0.9), "completeness": 0.8},
    }
    return AttributionGraph(nodes, edges * scale, TOKENS, **about | changes)


def large(n_nodes: int, n_links: int, *, tokens: int = 12, layers: int = 8, seed: int = 0) -> AttributionGraph:
    """A random graph of this size with every kind of node, some of them on several streams of one layer."""
    draw = random.Random(seed)
    text = tuple(f" word{pos}" for pos in range(tokens))
    nodes = [Node("token", -1, pos, 100 + pos, label=name) for pos, name in enumerate(text)]
    found: dict[str, Node] = {}
    while len(found) < n_nodes - tokens - 1:
        layer, pos = draw.randrange(layers), int(draw.triangular(0, tokens, tokens - 0.01))
        size = draw.gauss(0, 1)
        kind, stream = draw.choices(
            [("feature", "mlp_out"), ("feature", "resid_post"), ("error", "resid_post"), ("head", None), ("mlp", None),
             ("adapter", "mlp_out")], [8, 4, 1, 1, 1, 1])[0]  # fmt: skip
        number = {"error": -1, "head": draw.randrange(8), "mlp": None, "adapter": None}.get(
            kind, draw.randrange(16_384))  # fmt: skip
        node = Node(kind, layer, pos, number, stream, activation=abs(size), attribution=size, effect=size + 0.1,
                    label=f"notion {draw.randrange(99)}" if kind == "feature" else "")  # fmt: skip
        found[node.id] = node
    nodes += sorted(found.values(), key=lambda node: node.layer)
    nodes.append(Node("logit", layers, tokens - 1, 500, label=" end", weight=0.7))
    edges = torch.zeros(len(nodes), len(nodes))
    pairs = [(s, t) for t in range(len(nodes)) for s in range(t) if nodes[s].kind != "logit"
             and nodes[s].pos <= nodes[t].pos and nodes[s].layer < nodes[t].layer
             and nodes[t].kind not in ("token", "error")]  # fmt: skip
    for s, t in draw.sample(pairs, n_links):
        edges[t, s] = draw.gauss(0, 1)
    return AttributionGraph(tuple(nodes), edges, text, model="toy", prompt="".join(text),
                            validation={"pearson": estimate(0.9)})  # fmt: skip
