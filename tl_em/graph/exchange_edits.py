"""A graph that was read, as its file: what the graph holds is written from the graph, everything else as it stood.

Nodes and links keep the file's order and the file's own numbers (its double precision, its extra keys) as long as they
are what was read; what was taken out is left out, with the references of the saved view to it; what is new or changed
is written anew. Where two nodes of the file share an id, they keep it only in an unchanged file: in any other the order
that tells their links apart may be gone, so the later one gets an id of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tl_em.graph.exchange_format import Origin, plain, said_of
from tl_em.graph.nodes import Graph, Node

_SAID = {"label": "clerp", "influence": "influence", "activation": "activation", "weight": "token_prob"}
"""A node's fields that the format has a key for."""


def as_read(
    graph: Graph, origin: Origin, fresh: Mapping[str, Any], *, edited: bool
) -> tuple[dict[str, Any], list[Any]]:
    """The file's object with what the graph says now, and the id of each of the graph's nodes in it.

    Args:
        fresh: the graph as it is written without a file; edited: whether its links are others than the file's.
    """
    edited = edited or set(origin.nodes) != set(graph.index)
    nodes = [_node(n, origin, new) for n, new in zip(graph.nodes, fresh["nodes"], strict=True)]
    if edited:
        nodes = _named_apart(nodes, fresh["nodes"])
    ids = [each["node_id"] for each in nodes]
    place = {name: at for at, name in enumerate(origin.nodes)}
    order = sorted(range(len(nodes)), key=lambda row: place.get(graph.nodes[row].id, len(place)))
    parts = {
        "metadata": _metadata(graph, origin, fresh["metadata"], order),
        "qParams": _view(graph, origin, fresh["qParams"], ids),
        "nodes": [nodes[row] for row in order],
        "links": None,
    }
    written = {**origin.rest, **{name: parts[name] for name in ("metadata", "nodes", "links")}}
    if "qParams" in origin.rest or parts["qParams"]:
        written["qParams"] = parts["qParams"]
    return written, ids


def _node(node: Node, origin: Origin, fresh: Mapping[str, Any]) -> Mapping[str, Any]:
    raw, before = origin.nodes.get(node.id), origin.read.get(node.id)
    if raw is None or before is None or before == node:
        return fresh if raw is None else raw
    keys = [key for name, key in _SAID.items() if getattr(node, name) != getattr(before, name)]
    written = {**raw, **{key: fresh[key] for key in keys}}
    told = replace(before, **{name: getattr(node, name) for name in _SAID})
    if raw.get("tl_em") is None and told == node and said_of(written, node.kind) == (node.label, node.weight):
        return written
    return {**written, **{key: fresh[key] for key in ("kind", "hook", "tl_em")}}


def _named_apart(nodes: Sequence[Mapping[str, Any]], fresh: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Every node with an id of its own: of several with one, all but the first that is no error get a new one."""
    found = list(nodes)
    taken: set[str] = set()
    for at in sorted(range(len(found)), key=lambda at: "error" in str(found[at].get("feature_type"))):
        name, new = str(found[at]["node_id"]), fresh[at]
        if name in taken:
            head, number, pos = str(new["node_id"]).rsplit("_", 2)
            while (name := f"{head}_{number}_{pos}") in taken:
                number = str(int(number) + (1 if int(number) >= 0 else -1))
            found[at] = {**found[at], "node_id": name, "jsNodeId": new["jsNodeId"]}
        taken.add(name)
    return found


def _metadata(graph: Graph, origin: Origin, fresh: Mapping[str, Any], order: Sequence[int]) -> Mapping[str, Any]:
    raw, before = origin.rest["metadata"], origin.about
    told = {"model": "scan", "prompt": "prompt", "tokens": "prompt_tokens"}
    changed = [key for name, key in told.items() if getattr(graph, name) != before[name]]
    same = all(plain(getattr(graph, name)) == plain(before[name]) for name in ("settings", "validation"))
    if same and not changed:
        return raw
    written = {**raw, **{key: fresh[key] for key in changed}}
    if raw.get("tl_em") is None:
        now = {name: plain(value) for name, value in graph.settings.items() if name in raw}
        written |= {name: value for name, value in now.items() if value != plain(raw[name])}
    elif not same:
        written["generation_settings"] = fresh["generation_settings"]
    if graph.settings.get("pruned") != before["settings"].get("pruned"):
        written["pruning_settings"] = {**(raw.get("pruning_settings") or {}), **fresh["pruning_settings"]}
        written |= {"node_threshold": fresh["node_threshold"]} if "node_threshold" in fresh else {}
    given = {} if list(order) == sorted(order) else {"order": np.argsort(order).tolist()}
    return {**written, "tl_em": {**fresh["tl_em"], **given}}


def _view(graph: Graph, origin: Origin, fresh: Mapping[str, Any], ids: Sequence[Any]) -> Any:
    """The saved view, without references to nodes that are gone; with the graph's supernodes, where they are others."""
    raw = origin.rest.get("qParams")
    now = {node.id: name for node, name in zip(graph.nodes, ids, strict=True)}
    gone = {str(raw["node_id"]) for name, raw in origin.nodes.items() if name not in now} - set(map(str, ids))
    before = tuple((label, tuple(e for e in members if e in now)) for label, members in origin.about["supernodes"])
    moved = {str(origin.nodes[name]["node_id"]) for name, new in now.items()
             if name in origin.nodes and origin.nodes[name]["node_id"] != new}  # fmt: skip
    regrouped = graph.supernodes != origin.about["supernodes"] and graph.supernodes != tuple(e for e in before if e[1])
    if not isinstance(raw, Mapping):
        return fresh if regrouped and graph.supernodes else raw
    if not (gone or moved or regrouped):
        return raw
    written = dict(raw)
    if isinstance(raw.get("pinnedIds"), list):
        written["pinnedIds"] = [each for each in raw["pinnedIds"] if str(each) not in gone]
    if str(raw.get("clickedId")) in gone:
        written["clickedId"] = ""
    if isinstance(raw.get("supernodes"), list):
        groups = [[*each[:1], *(m for m in each[1:] if str(m) not in gone)] if isinstance(each, list) else each
                  for each in raw["supernodes"]]  # fmt: skip
        written["supernodes"] = [g for g, old in zip(groups, raw["supernodes"], strict=True) if g == old or len(g) > 1]
    if regrouped:
        written["supernodes"] = [[label, *(now[each] for each in members if each in now)] for label, members in
                                 graph.supernodes]  # fmt: skip
        pins = written.get("pinnedIds")
        pinned = pins if isinstance(pins, list) else []
        members = [each for group in written["supernodes"] for each in group[1:]]
        written["pinnedIds"] = list(dict.fromkeys([*pinned, *members]))
    return written
